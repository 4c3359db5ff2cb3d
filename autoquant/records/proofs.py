"""What was measured of a plan: in the whole model, as its user runs it, on tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from autoquant.records.numbers import AboveZero, Count, Finite, NonNegative

Measure = Literal["perplexity", "loss", "divergence"]
"""What measures quality: perplexity, the user's own loss, or divergence of outputs."""
Loop = Literal["generate", "forward"]
"""What a user runs: `generate` of a language model, or the forward pass of another module."""
Where = Literal["new process", "same process", "in memory"]

STAND_IN = "the unquantized model does not fit: timed with the weights of"
"""Start of the note of times that are a stand-in's, see `autoquant.models.stand_in`."""
PARTLY = "quality from"
"""Start of the note of a proof whose quality was measured on some windows only."""
RIGHT = "right on"
"""Start of the note of a proof that counted how many labels a model gets right."""
DISTURBED = "timed while"
"""Start of the note of a proof whose times something disturbed, such as other programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was measured of a plan by applying it.

    Attributes:
        request_ms: Time of one request: the sum over phases of calls times the median latency.
        phase_ms: Median milliseconds of one run of each phase.
        original_request_ms: Request time of the unquantized model, timed in turn with the plan.
        original_phase_ms: The unquantized model's `phase_ms`, timed in turn with the plan.
        perplexity: Perplexity on the report part of the text, or None without a text.
        loss: Mean loss on the report part: nats per token, the user's own loss, or divergence of
            outputs.
        increase: Relative increase over the unquantized model on the report part, with its paired
            interval. For divergence of outputs, the divergence itself.
        selection_increase: The same on the selection part, which limits are checked against. The
            interval is for the mean of as many further samples as the report part has. Older
            versions stored the interval for the mean over all text.
        kl: Mean divergence from the unquantized model on the report part, or None.
        memory_bytes: Bytes of all parameters as stored.
        selection_kl: The divergence on the selection part with its interval, or None.
        selection_losses: Loss of each sample of the selection part, to compare plans sample by
            sample. Empty in proofs of older versions.
        time_ratio: Request time over that of the unquantized model, with its interval from the
            spread of the rounds. None in proofs of older versions.
        seconds: What each part of the proof took. Empty in proofs of older versions.
        kv_bytes: Of keys and values of one sequence of the workload, or None.
    """

    plan_id: str
    request_ms: AboveZero
    phase_ms: Mapping[str, NonNegative]
    original_request_ms: AboveZero
    original_phase_ms: Mapping[str, NonNegative]
    perplexity: float | None
    loss: float
    increase: Interval
    selection_increase: Interval
    kl: float | None
    memory_bytes: Count
    execution: str = "compiled"
    notes: tuple[str, ...] = field(default_factory=tuple)
    selection_kl: Interval | None = None
    selection_losses: tuple[float, ...] = ()
    time_ratio: Interval | None = None
    seconds: Mapping[str, NonNegative] = field(default_factory=dict)
    kv_bytes: Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimes:
    """Median milliseconds of what a user runs.

    Attributes:
        request_ms: Time of a prompt with all its new tokens, or of one forward pass.
        first_token_ms: Time of a request for one new token, or None for a forward pass.
        step_ms: Time of each further token, or None without one.
    """

    request_ms: AboveZero
    first_token_ms: Finite | None = None
    step_ms: Finite | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """The outcome of saving a plan, loading it and running it as its user will.

    Attributes:
        loop: What was run.
        where: The plan was loaded in a new process, in the same process, or not saved at all.
        times: Times of the plan, in turn with the unquantized model, or None if timing failed.
        original_times: The same of the unquantized model.
        ratio: Request time over that of the unquantized model, with its interval from the spread
            of the rounds.
        logits_error: Relative difference from the logits of the plan in memory. 0 if they are equal
            bit for bit.
        reason: Why the plan cannot be used, or an empty text.
        seconds: What each part of the delivery took. Empty in those of older versions.
    """

    plan_id: str
    loop: Loop
    where: Where
    times: RunTimes | None = None
    original_times: RunTimes | None = None
    ratio: Interval | None = None
    logits_error: float | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, NonNegative] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task of lm-evaluation-harness, for one model.

    Attributes:
        metric: The metric's name, followed by a comma and lm-eval's filter if there is one.
        stderr: Standard error of `value`, or None if lm-eval gives none.
        samples: Samples behind the value, or None for a group of tasks.
        limit: The most samples asked for, or None for all.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None
    limit: int | None
    lm_eval_version: str
