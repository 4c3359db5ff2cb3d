"""A choice for every layer, with what is predicted of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from autoquant.records.numbers import Count, Finite, NonNegative, Positive
from autoquant.records.timings import LinearShape

PlanKind = Literal["original", "uniform", "heuristic", "bits", "front", "refined", "solved"]
BASELINES: tuple[PlanKind, ...] = ("uniform", "heuristic", "bits")
"""Kinds of plans that ignore each layer's latency. A searched plan has to beat them."""
KvCache = Literal["int8", "float8"]
"""How `generate` keeps keys and values: codes of 8 bits, with a scale for each head and token."""
KV_CACHES: tuple[KvCache, ...] = ("int8", "float8")
KV_CACHE_OFF = "off"
"""What a user says for keys and values in the model's dtype."""
Objective = Literal["time", "memory"]
"""What the recommended plan minimizes: time of a request, or bytes of all parameters."""

LOOKUP = "lookup"
"""The kernel of a table's route, and its numerics: rows are looked up."""

ORIGINAL_LABEL = "original"
"""Label of the plan that is the unquantized model. Databases hold it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteStep:
    """Use `kernel` for every m up to and including `upper_m`. None stands for every larger m."""

    upper_m: Positive | None
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
        experts: The matrices of `shape` in the parameter; each has the format.
        turned: The parameter of experts is `[experts, k, n]`.
        tied: Of a table, the name of the layer that multiplies with the same tensor, or "". If both
            get one format, they share one stored tensor, which counts as that layer's.
        joined: Names of the layers that are computed as one, with this one. Empty if the layer is
            computed alone.
        reason: Why this choice was made.
    """

    name: str
    shape: LinearShape
    format: str
    route: Route
    numerics: str
    latency_us: Mapping[str, NonNegative]
    memory_bytes: Count
    loss: Finite
    parameters: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    reason: str = ""
    experts: Positive = 1
    turned: bool = False
    tied: str = ""

    @property
    def is_table(self) -> bool:
        """Rows are looked up, and nothing is multiplied."""
        return self.route[0].kernel == LOOKUP

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameters that are replaced."""
        n, k = self.shape.n, self.shape.k
        if self.experts == 1:
            return n, k
        return (self.experts, k, n) if self.turned else (self.experts, n, k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Sums of the additive model for a plan.

    Attributes:
        request_ms: Time of the linears and the measured rest of the model (attention, norms, glue).
        original_request_ms: Time of the unquantized model when that rest was measured, or None.
    """

    request_ms: Finite
    linear_ms: Finite
    loss: Finite
    memory_bytes: Count
    original_request_ms: Finite | None = None

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
    """A choice for every layer of the model with the content hash `model_hash`.

    Attributes:
        kv_cache: How its `generate` keeps keys and values; None for the model's dtype.
    """

    plan_id: str
    study_id: str
    label: str
    kind: PlanKind
    model_hash: str
    dtype: str
    layers: tuple[LayerChoice, ...]
    prediction: Prediction
    kv_cache: KvCache | None = None

    def formats(self) -> dict[str, int]:
        """Return how many layers have each format, the most used first."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.format] = counts.get(layer.format, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))
