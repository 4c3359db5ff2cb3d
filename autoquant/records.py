"""The records that every other module speaks in, as frozen dataclasses.

They need neither torch nor a database. Units are part of the names: `_us` microseconds, `_ms`
milliseconds, `_bytes` bytes. A loss is a mean Kullback-Leibler divergence per token, in nats,
unless the user gives a quality function.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from autoquant.errors import WorkloadError

Outcome = Literal["ok", "unsupported", "bounded", "beaten", "incorrect", "failed"]
"""What came of a timing.

`bounded` was never prepared, because the roofline shows that it cannot win. `beaten` was tried
and is far behind.
"""
PlanKind = Literal["original", "uniform", "heuristic", "bits", "front", "refined", "solved"]
BASELINES: tuple[PlanKind, ...] = ("uniform", "heuristic", "bits")
"""Kinds of plans that ignore each layer's latency. A searched plan has to beat them."""
Objective = Literal["time", "memory"]
"""What the recommended plan minimizes: time of a request, or bytes of all parameters."""
Measure = Literal["perplexity", "loss", "divergence"]
"""What measures quality: perplexity, the user's own loss, or divergence of outputs."""
Loop = Literal["generate", "forward"]
"""What a user runs: `generate` of a language model, or the forward pass of another module."""
Where = Literal["new process", "same process", "in memory"]

DISTURBED = "timed while"
"""Start of the note of a proof whose times something disturbed, such as other programs."""

ORIGINAL_LABEL = "original"
"""Label of the plan that is the unquantized model. Databases hold it."""


def content_key(value: object, length: int = 12) -> str:
    """Return a hash of `value`'s canonical JSON, which is the same in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """What one linear computes: `y[m, n] = x[m, k] @ w[n, k].T (+ bias[n])`.

    Attributes:
        dtype: The dtype of x, w and y.
    """

    n: int
    k: int
    bias: bool
    dtype: str

    def __str__(self) -> str:
        return f"{self.n}x{self.k}{'+bias' if self.bias else ''}:{self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One kind of forward pass.

    Attributes:
        tokens: Tokens per sequence in one call.
        calls: Calls in one request.
    """

    name: str
    tokens: int
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the model does in one request: phases at a batch size."""

    phases: tuple[Phase, ...]
    batch: int = 1

    @classmethod
    def parse(cls, text: str, batch: int = 1) -> Workload:
        """Read `prefill=TOKENS,decode=STEPS`. Either part may be left out.

        Raises:
            WorkloadError: The text does not follow that form, or a number is not positive.
        """
        advice = (
            f"cannot read workload {text!r}: write it as prefill=TOKENS,decode=STEPS, "
            "e.g. prefill=512,decode=128"
        )
        if batch < 1:
            raise WorkloadError(f"batch must be at least 1, not {batch}")
        counts: dict[str, int] = {}
        for part in text.split(","):
            name, _, number = part.strip().partition("=")
            if (
                name not in ("prefill", "decode")
                or name in counts
                or not re.fullmatch("[0-9]{1,9}", number)
            ):
                raise WorkloadError(advice)
            counts[name] = int(number)
        if not all(counts.values()):
            raise WorkloadError(advice)
        phases = []
        if "prefill" in counts:
            phases.append(Phase(name="prefill", tokens=counts["prefill"], calls=1))
        if "decode" in counts:
            phases.append(Phase(name="decode", tokens=1, calls=counts["decode"]))
        return cls(phases=tuple(phases), batch=batch)

    @classmethod
    def single(cls) -> Workload:
        """Return the workload of a module with sample inputs: one forward pass."""
        return cls(phases=(Phase(name="forward", tokens=0, calls=1),))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a sequence before the first new one. Decoding alone starts after one token."""
        return next((phase.tokens for phase in self.phases if phase.name == "prefill"), 1)

    @property
    def new_tokens(self) -> int:
        """Tokens that a request generates. A prompt alone generates one."""
        return next((phase.calls for phase in self.phases if phase.name == "decode"), 1)

    def calls(self) -> dict[str, int]:
        """Return the calls in one request by phase."""
        return {phase.name: phase.calls for phase in self.phases}

    def __str__(self) -> str:
        parts = (f"{p.name}={p.calls if p.name == 'decode' else p.tokens}" for p in self.phases)
        return ",".join(parts) + (f" batch={self.batch}" if self.batch != 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteUse:
    """How one phase uses a linear.

    Attributes:
        m: Rows of the activation.
        calls: Calls in one run of the phase.
    """

    phase: str
    m: int
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One weight that is multiplied as a linear.

    Attributes:
        name: Module path, or parameter name if no module holds the weight alone.
        parameters: Parameter names that quantizing replaces. Linears that share a weight give
            more than one.
        kept: Parameter names of the same tensor that stay unquantized, such as an embedding tied
            to the head. Quantizing frees no memory then.
        siblings: Names of the sites that read the same input tensor, in order, with this one.
    """

    name: str
    parameters: tuple[str, ...]
    shape: LinearShape
    uses: tuple[SiteUse, ...]
    kept: tuple[str, ...] = ()
    siblings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A weight that is not searched, and why.

    Attributes:
        share: Fraction of the model's parameters, 0 to 1.
    """

    name: str
    numel: int
    share: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The sites of a model, and the fractions of the model that they cover (0 to 1)."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    weights_share: float
    flops_share: Mapping[str, float]
    parameter_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A fingerprint of what runs the kernels.

    A change of any field changes the key in the store.
    """

    type: str
    name: str
    capability: str
    threads: int
    cache_bytes: int
    versions: Mapping[str, str]

    @property
    def key(self) -> str:
        return content_key(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingSubject:
    """What is timed: one candidate on one shape and m.

    Attributes:
        working_set_bytes: Bytes of weights that a timing rotates through, so that they are cold.
    """

    shape: LinearShape
    m: int
    format: str
    kernel: str
    working_set_bytes: int

    @property
    def candidate(self) -> str:
        return f"{self.format}/{self.kernel}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The outcome of timing one subject: samples, or a reason for having none."""

    subject: TimingSubject
    outcome: Outcome
    reason: str = ""
    samples_us: tuple[float, ...] = ()
    relative_error: float | None = None

    @property
    def latency_us(self) -> float:
        """Median of the samples."""
        ordered = sorted(self.samples_us)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def spread_us(self) -> float:
        """Interquartile range of the samples."""
        ordered = sorted(self.samples_us)
        return ordered[(3 * len(ordered)) // 4] - ordered[len(ordered) // 4]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The two measured limits of a device that no kernel passes.

    Attributes:
        bandwidth_bytes_per_s: Bytes read plus bytes written in memory beyond the last-level cache.
        flops_per_s: Rate of a large matrix product, by arithmetic (`bfloat16`, `float16`,
            `float32`, `int8`, `float8`) that the device has.
    """

    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteStep:
    """Use `kernel` for every m up to and including `upper_m`. None stands for every larger m."""

    upper_m: int | None
    kernel: str


Route = tuple[RouteStep, ...]


def route_kernel(route: Route, m: int) -> str:
    """Return the kernel that `route` uses for `m` rows."""
    for step in route:
        if step.upper_m is None or m <= step.upper_m:
            return step.kernel
    return route[-1].kernel


@dataclass(frozen=True, slots=True)
class Numerics:
    """What decides how exact a linear is, however fast it is computed.

    Attributes:
        values: Which numbers the weight holds, the first part of a format's id, e.g. `int8-row`.
        activation: How the activation is rounded, e.g. `a16` (not at all).
    """

    values: str
    activation: str

    @classmethod
    def parse(cls, text: str) -> Numerics:
        """Read what `str` writes."""
        values, _, activation = text.partition("+")
        return cls(values, activation)

    def __str__(self) -> str:
        return f"{self.values}+{self.activation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """What one layer gets in a plan: a format and its route, with predictions and a reason.

    Attributes:
        parameters: Names of the parameters that are replaced.
        latency_us: Predicted microseconds in one run of each phase, of all calls in it together.
        numerics: Text of the `Numerics` that `loss` is of; empty before the choice is scored.
        loss: Predicted loss of this choice alone.
        joined: Names of the layers that are computed as one, with this one. Empty if the layer is
            computed alone.
        reason: Why this choice was made.
    """

    name: str
    shape: LinearShape
    format: str
    route: Route
    numerics: str
    latency_us: Mapping[str, float]
    memory_bytes: int
    loss: float
    parameters: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Sums of the additive model for a plan.

    Attributes:
        request_ms: Time of the linears and the measured rest of the model (attention, norms, glue).
        original_request_ms: Time of the unquantized model when that rest was measured, or None.
    """

    request_ms: float
    linear_ms: float
    loss: float
    memory_bytes: int
    original_request_ms: float | None = None

    def request_ms_beside(self, original_request_ms: float) -> float:
        """Return `request_ms`, scaled to the unquantized model's time of today.

        The machine may have become slower or faster since the prediction was made.
        """
        return (
            self.request_ms
            * original_request_ms
            / (self.original_request_ms or original_request_ms)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A choice for every layer of the model with the content hash `model_hash`."""

    plan_id: str
    study_id: str
    label: str
    kind: PlanKind
    model_hash: str
    dtype: str
    layers: tuple[LayerChoice, ...]
    prediction: Prediction

    def formats(self) -> dict[str, int]:
        """Return how many layers have each format, the most used first."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.format] = counts.get(layer.format, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def request_time(phase_times: Mapping[str, float], calls: Mapping[str, int]) -> float:
    """Return the time of one request, in the unit of its phases.

    It is the sum over phases of the calls times the time of one.
    """
    return sum(calls[phase] * time for phase, time in phase_times.items())


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
    """

    plan_id: str
    request_ms: float
    phase_ms: Mapping[str, float]
    original_request_ms: float
    original_phase_ms: Mapping[str, float]
    perplexity: float | None
    loss: float
    increase: Interval
    selection_increase: Interval
    kl: float | None
    memory_bytes: int
    execution: str = "compiled"
    notes: tuple[str, ...] = field(default_factory=tuple)
    selection_kl: Interval | None = None
    selection_losses: tuple[float, ...] = ()
    time_ratio: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimes:
    """Median milliseconds of what a user runs.

    Attributes:
        request_ms: Time of a prompt with all its new tokens, or of one forward pass.
        first_token_ms: Time of a request for one new token, or None for a forward pass.
        step_ms: Time of each further token, or None without one.
    """

    request_ms: float
    first_token_ms: float | None = None
    step_ms: float | None = None


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
