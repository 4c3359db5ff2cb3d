"""The effort of measurements: how long and how often something is timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingEffort:
    """The cost and the care of every measurement.

    Attributes:
        attempts: How often to measure again if other programs disturb it.
        highest_other_load: Above this fraction of the machine's time, others disturb a measurement.
        linear_warm_up_s: Candidates run for so long before the samples of a comparison.
        linear_rounds: Most samples of each candidate in a comparison.
        linear_budget_s: A comparison begins no further round after this time.
        sample_s: Length of one sample by the host's clock.
        repeat_s: Seconds of computing in which a timed candidate is called again, to compare its
            results.
        candidate_limit_s: A candidate that takes longer to be prepared or timed is ended, unless
            others hold it up.
        most_memory: A job may take this part of the memory that is available when it starts.
        request_rounds: Rounds in which whole models are timed in turn.
        fewest_request_rounds: Rounds that are done even if they exceed a limit.
        request_calls: Most calls of a phase in one round.
        request_round_s: A phase begins no further call in a round after this time.
        fewest_loop_rounds, loop_rounds: Rounds in which the loops of users are timed in turn.
        loop_limit_s: The loops begin no further round after this time.
        loop_precision: The loops end once half the interval of the ratio of their times is below
            this fraction of the ratio.
        largest_copy_bytes, largest_product: Limits on what a roofline is measured with: bytes
            copied, and rows of a square matrix.
    """

    attempts: int = 3
    highest_other_load: float = 0.15
    linear_warm_up_s: float = 0.1
    linear_rounds: int = 16
    linear_budget_s: float = 1.5
    sample_s: float = 2e-3
    repeat_s: float = 0.05
    candidate_limit_s: float = 180.0
    most_memory: float = 0.9
    request_rounds: int = 6
    fewest_request_rounds: int = 3
    request_calls: int = 16
    request_round_s: float = 0.1
    fewest_loop_rounds: int = 4
    loop_rounds: int = 30
    loop_limit_s: float = 30.0
    loop_precision: float = 0.02
    largest_copy_bytes: int = 1 << 30
    largest_product: int = 8192


_default = TimingEffort()


def timing_effort() -> TimingEffort:
    """Return the effort of measurements that are given no other."""
    return _default


def use_timing_effort(effort: TimingEffort) -> None:
    """Let `timing_effort` return this one in this process, and in those that it starts."""
    global _default
    _default = effort


@contextmanager
def timing_effort_of(effort: TimingEffort) -> Iterator[None]:
    """Inside, `timing_effort` returns this one."""
    before = _default
    use_timing_effort(effort)
    try:
        yield
    finally:
        use_timing_effort(before)
