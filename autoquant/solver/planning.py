"""Plans: what they are made of, what is predicted of them, and the reasons for their choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from autoquant.records import (
    KvCache,
    LayerChoice,
    Plan,
    PlanKind,
    Prediction,
    Proof,
    Workload,
    content_key,
    request_time,
)
from autoquant.solver.additivity import ADDITION, LossMap
from autoquant.solver.alternatives import next_faster, next_more_exact
from autoquant.solver.constraints import UNBOUND, Bound
from autoquant.solver.tied import counted_once

ProvenPlans = Mapping[str, tuple[Plan, Proof]]
"""By plan id."""


class Joins(Protocol):
    """Joins layers of a plan; see `autoquant.tuner.fusion`."""

    def join(self, choices: Sequence[LayerChoice]) -> list[LayerChoice]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanContext:
    """What every plan of a study has in common.

    Attributes:
        other_bytes: Bytes of the parameters that are not searched.
        rest_ms: Milliseconds of a request outside the linears (0 until measured).
        original_request_ms: What a request of the unquantized model took then, or None.
        fusion: Joins layers that were chosen one by one and read the same input, or None.
        loss_map: From the layers' summed losses to the loss of a plan.
        bound: Which layers get the same scheme, and why some cannot get every format.
    """

    study_id: str
    model_hash: str
    dtype: str
    workload: Workload
    other_bytes: int
    rest_ms: float = 0.0
    original_request_ms: float | None = None
    fusion: Joins | None = None
    loss_map: LossMap = ADDITION
    bound: Bound = UNBOUND


def request_us(choice: LayerChoice, workload: Workload) -> float:
    """Return the microseconds that a layer takes in one request."""
    return request_time(choice.latency_us, workload.calls())


def request_ms(choice: LayerChoice, workload: Workload) -> float:
    """Return the milliseconds that a layer takes in one request."""
    return request_us(choice, workload) / 1e3


def fastest_choice(choices: Sequence[LayerChoice], workload: Workload) -> LayerChoice:
    """Return the choice that takes the least time in one request."""
    return min(choices, key=lambda choice: request_us(choice, workload))


def make_plan(
    choices: Sequence[LayerChoice], label: str, kind: PlanKind, context: PlanContext
) -> Plan:
    """Make a plan of these choices.

    Its id is a hash of what it does, so the same plan has the same id in every run.
    """
    if context.fusion is not None:
        choices = context.fusion.join(choices)
    choices = counted_once(choices)
    return Plan(
        plan_id=content_key([context.study_id, [_does(choice) for choice in choices]], 8),
        study_id=context.study_id,
        label=label,
        kind=kind,
        model_hash=context.model_hash,
        dtype=context.dtype,
        layers=tuple(choices),
        prediction=predict(choices, context),
    )


def with_kv_cache(plan: Plan, kind: KvCache) -> Plan:
    """Return the plan with keys and values kept in another way.

    Its prediction is that of the plan: what the cache changes is measured.
    """
    own = f", {plan.kv_cache} cache"
    return replace(
        plan,
        plan_id=content_key([plan.plan_id, kind], 8),
        label=f"{plan.label.removesuffix(own)}, {kind} cache",
        kind="refined",
        kv_cache=kind,
    )


def _does(choice: LayerChoice) -> tuple[Any, ...]:
    """Return what a choice does, for the id of its plan."""
    route = [(step.upper_m, step.kernel) for step in choice.route]
    alone = (choice.name, choice.format, route)
    # A layer by itself has no fourth part, so ids are what they were before layers could be joined.
    return (*alone, choice.joined) if choice.joined else alone


def predict(choices: Sequence[LayerChoice], context: PlanContext) -> Prediction:
    """Add up times and bytes, and map the summed losses to the loss of the plan."""
    linear_ms = sum(request_ms(choice, context.workload) for choice in choices)
    return Prediction(
        request_ms=linear_ms + context.rest_ms,
        linear_ms=linear_ms,
        loss=context.loss_map.plan_loss(sum(choice.loss for choice in choices)),
        memory_bytes=sum(choice.memory_bytes for choice in choices) + context.other_bytes,
        original_request_ms=context.original_request_ms,
    )


def with_reason(choice: LayerChoice, why: str, context: PlanContext) -> LayerChoice:
    """Return the choice with its reason: what constrains the layer, then `why`."""
    reasons = [context.bound.reasons.get(choice.name), why]
    return replace(choice, reason="; ".join(filter(None, reasons)))


def explain(own: LayerChoice, layer: Sequence[LayerChoice], context: PlanContext) -> str:
    """Say why a layer gets this choice of its options.

    Names what constrains the layer, and what the next more exact and the next faster option would
    have cost.
    """
    workload = context.workload
    constrained = context.bound.reasons.get(own.name)
    parts = [constrained] if constrained else []
    if other := next_more_exact(own, layer, workload):
        cost_us = request_us(other, workload) - request_us(own, workload)
        loss = other.loss - own.loss
        parts.append(
            f"more exact {_called(other)} would take {cost_us:+.0f} us a request for {loss:+.2g}"
            " loss"
        )
    if other := next_faster(own, layer, workload):
        gain_us = request_us(other, workload) - request_us(own, workload)
        loss = other.loss - own.loss
        parts.append(f"faster {_called(other)} would take {gain_us:+.0f} us for {loss:+.2g} loss")
    return "; ".join(parts) or "fastest and most exact of all"


def _called(choice: LayerChoice) -> str:
    return f"{choice.format} as one with others" if choice.joined else choice.format
