"""The time of one request: a plan and the unquantized model, measured in turn."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from autoquant.devices import Backend, Division, backend
from autoquant.devices.effort import TimingEffort, timing_effort
from autoquant.devices.memory import release_memory
from autoquant.devices.watch import Watch
from autoquant.errors import first_line
from autoquant.files import raise_if_full
from autoquant.intervals import mean_interval
from autoquant.records import DISTURBED, Interval, request_time
from autoquant.runtime.agreement import unexplained_error
from autoquant.runtime.phases import Phases

WARM_UP_CALLS = 2
MAX_RELATIVE_ERROR = 0.1


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Median milliseconds of one call of each phase, of a plan and of the unquantized model.

    Attributes:
        rounds: The pairs (plan, unquantized model) that these are medians of.
    """

    plan_ms: Mapping[str, float]
    original_ms: Mapping[str, float]
    note: str = ""
    rounds: tuple[tuple[Mapping[str, float], Mapping[str, float]], ...] = ()

    def request_ms(self, calls: Mapping[str, int]) -> tuple[float, float]:
        """Return the milliseconds of one request by the plan and by the unquantized model."""
        return request_time(self.plan_ms, calls), request_time(self.original_ms, calls)

    def ratio(self, calls: Mapping[str, int]) -> Interval:
        """Return the plan's request time over the unquantized model's, with its 95 % interval.

        The interval follows from the spread of the rounds.
        """
        plan_ms, original_ms = self.request_ms(calls)
        value = plan_ms / original_ms
        each = [
            request_time(plan, calls) / request_time(original, calls)
            for plan, original in self.rounds
        ]
        if not each:
            return Interval(value=value, low=-math.inf, high=math.inf)
        interval = mean_interval(each)
        half = interval.high - interval.value
        return Interval(value=value, low=value - half, high=value + half)


class Runnable(Protocol):
    """A model that can be timed: `run` does one call, and `limit` calls may follow a `reset`."""

    def reset(self, phase: str) -> None: ...

    def run(self, phase: str) -> Any: ...

    def limit(self, phase: str) -> int: ...


class WrongResultError(Exception):
    """Compiled code gives other results than the same model does eagerly."""


def warm_up(phases: Phases) -> None:
    """Compile every phase, check its results, and run it until it has settled.

    Raises:
        WrongResultError: The compiled phase's output differs from the eager one's by more than
            rounding explains, see `autoquant.runtime.agreement`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for phase in phases.workload.phases:
            phases.reset(phase.name)
            expected = phases.run_eager(phase.name)
            phases.reset(phase.name)
            got = phases.run(phase.name)
            error = unexplained_error(got, expected, partial(_run_eagerly, phases, phase.name))
            if error is not None:
                raise WrongResultError(
                    f"compiled {phase.name} is off by {error:.2g} (relative) from the same plan"
                    " run eagerly"
                )
            for _ in range(WARM_UP_CALLS):
                phases.reset(phase.name)
                phases.run(phase.name)
            release_memory()  # what the compiler leaves behind, before the next phase is compiled


def _run_eagerly(phases: Phases, name: str) -> torch.Tensor:
    phases.reset(name)
    return phases.run_eager(name)


def make_warm(make: Callable[..., Phases], divisions: Sequence[Division]) -> tuple[Phases, str]:
    """Make phases and warm them up, by the first way of compiling that works.

    Args:
        make: `make_phases` with all its arguments but `division`.
        divisions: The ways, in the order in which to try them.

    Returns:
        The phases, and a note if it was not the first way.

    Raises:
        WrongResultError: The model gives other results in the last way, too. Any other error of
            that way is raised as well.
    """
    reason = ""
    for division in divisions:
        try:
            phases = make(division=division)
            warm_up(phases)
            return phases, f"{_COMPILED[division]}: {reason}" if reason else ""
        except Exception as error:
            raise_if_full(error)
            if division == divisions[-1]:
                raise
            reason = reason or first_line(error, with_type=True)
    raise ValueError("there is no way to compile")


_COMPILED: dict[Division, str] = {
    "regions": "compiled in one piece, not part by part",
    "whole": "compiled whole, not block by block",
}


def time_requests(
    plan: Phases, original: Phases, device: str, effort: TimingEffort | None = None
) -> RequestTimes:
    """Time both models, already warm, in turn, and take medians over rounds.

    Args:
        effort: None for the process's own, `timing_effort()`.
    """
    (of_original, of_plan), note = rounds_in_turn(
        [original, plan], _names(original), device, effort
    )
    return paired(of_plan, of_original, note)


def time_in_turn(
    models: Sequence[Phases], device: str, effort: TimingEffort | None = None
) -> tuple[list[dict[str, float]], str]:
    """Time as `rounds_in_turn`, and take medians over rounds for each model."""
    rounds, note = rounds_in_turn(models, _names(models[0]), device, effort)
    return [_medians(taken) for taken in rounds], note


def paired(
    plan: Sequence[Mapping[str, float]], original: Sequence[Mapping[str, float]], note: str
) -> RequestTimes:
    """Return the times of a plan and of the unquantized model from the same rounds."""
    return RequestTimes(
        _medians(plan), _medians(original), note, tuple(zip(plan, original, strict=True))
    )


Rounds = list[list[dict[str, float]]]
"""For each model and round, the milliseconds of one call of each phase."""


@dataclass(frozen=True, slots=True)
class UntilEnough:
    """Ends rounds once they tell enough.

    Attributes:
        enough: Whether rounds that were done are enough.
        fewest, most: Numbers of rounds.
        limit_s: Begin no further round, and do not repeat, after that time.
    """

    enough: Callable[[Rounds], bool]
    fewest: int
    most: int
    limit_s: float


def rounds_in_turn(
    models: Sequence[Runnable],
    names: Sequence[str],
    device: str,
    effort: TimingEffort | None = None,
    until: UntilEnough | None = None,
) -> tuple[Rounds, str]:
    """Time models, already warm, in rounds, each of which begins with another model.

    All rounds are repeated while something disturbs them (see `autoquant.devices.watch`).

    Args:
        names: Names of the phases.
        effort: None for the process's own, `timing_effort()`.
        until: None for the effort's number of rounds.

    Returns:
        The times, and a note if that went on.
    """
    effort = effort or timing_effort()
    place = backend(device)
    end_s = time.perf_counter() + (until.limit_s if until else math.inf)
    for attempt in range(effort.attempts):
        watch = Watch(place.watch_load())
        times: Rounds = [[] for _ in models]
        while not _is_done(times, effort, until, end_s):
            _add_round(times, models, names, place, effort)
        disturbance = watch.disturbance(effort.highest_other_load)
        if not disturbance:
            return times, ""
        if time.perf_counter() > end_s:
            break
        time.sleep(attempt)
    return times, f"{DISTURBED} {disturbance}: `autoquant bench` times it again"


def _is_done(times: Rounds, effort: TimingEffort, until: UntilEnough | None, end_s: float) -> bool:
    done = len(times[0])
    if done >= effort.fewest_request_rounds and time.perf_counter() > end_s:
        return True
    if until is None:
        return done >= effort.request_rounds
    return done >= until.most or (done >= until.fewest and until.enough(times))


def _add_round(
    times: Rounds,
    models: Sequence[Runnable],
    names: Sequence[str],
    place: Backend,
    effort: TimingEffort,
) -> None:
    first = len(times[0]) % len(models)
    pairs = list(zip(models, times, strict=True))
    for taken in times:
        taken.append({})
    for name in names:
        for model, taken in pairs[first:] + pairs[:first]:
            taken[-1][name] = _sample(model, name, place, effort)


def _names(phases: Phases) -> list[str]:
    return [phase.name for phase in phases.workload.phases]


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(taken[name] for taken in rounds) for name in rounds[0]}


def _sample(model: Runnable, name: str, place: Backend, effort: TimingEffort) -> float:
    """Return the median milliseconds of several calls in a row.

    Only calls count as the sample's time. What a reset does may take longer than many of them.
    """
    calls: list[float] = []
    left = 0
    while len(calls) < effort.request_calls and sum(calls) < 1e3 * effort.request_round_s:
        if left == 0:
            model.reset(name)
            left = model.limit(name)
            if left > 1:  # the first call of several settles what ran before
                model.run(name)
                left -= 1
        place.synchronize()
        start = time.perf_counter()
        model.run(name)
        place.synchronize()
        calls.append((time.perf_counter() - start) * 1e3)
        left -= 1
    return statistics.median(calls)
