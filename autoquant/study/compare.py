"""Compare two plans of a study layer by layer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoquant.errors import PlanError
from autoquant.records import LayerChoice, Plan, Workload, request_time


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """A layer that gets another format or route, with predicted differences (after less before).

    Attributes:
        request_us: Microseconds in one request, all phases with all their calls.
    """

    before: LayerChoice
    after: LayerChoice
    request_us: float
    loss: float
    memory_bytes: int


def changes(before: Plan, after: Plan, workload: Workload) -> list[LayerChange]:
    """Return the layers whose format or route differs, in the order of the plan.

    Raises:
        PlanError: The plans are of different studies or layers.
    """
    if before.study_id != after.study_id:
        raise PlanError(
            f"plan {after.plan_id} is of study {after.study_id}, plan {before.plan_id} of"
            f" {before.study_id}: compare plans of one study, `autoquant pareto --study ID` lists"
            " them"
        )
    check_same_layers((before, after))
    choices = {layer.name: layer for layer in after.layers}
    pairs = [(layer, choices[layer.name]) for layer in before.layers]
    return [
        _change(old, new, workload)
        for old, new in pairs
        if (old.format, old.route) != (new.format, new.route)
    ]


def check_same_layers(plans: Sequence[Plan]) -> None:
    """Check that plans of a study are of the same layers.

    Raises:
        PlanError: One has a layer that the first has not, or the other way round.
    """
    first, *others = plans
    expected = {layer.name for layer in first.layers}
    for plan in others:
        if differing := expected ^ {layer.name for layer in plan.layers}:
            raise PlanError(
                f"plans {plan.plan_id} and {first.plan_id} differ in whether they have layer"
                f" {min(differing)}: one is damaged; restore the database from a copy, or search"
                " again"
            )


def summed(parts: Sequence[LayerChange]) -> tuple[float, float, int]:
    """Return the microseconds of a request, loss and bytes of several changes together."""
    return (
        sum(part.request_us for part in parts),
        sum(part.loss for part in parts),
        sum(part.memory_bytes for part in parts),
    )


def _change(before: LayerChoice, after: LayerChoice, workload: Workload) -> LayerChange:
    calls = workload.calls()
    return LayerChange(
        before=before,
        after=after,
        request_us=request_time(after.latency_us, calls) - request_time(before.latency_us, calls),
        loss=after.loss - before.loss,
        memory_bytes=after.memory_bytes - before.memory_bytes,
    )
