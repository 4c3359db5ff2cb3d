"""Baselines: plans that one would choose without measuring each layer's latency.

They are proven like any other plan, and a searched plan has to beat them. The structural heuristic
follows llama.cpp's K-quant mixtures (`llama_tensor_get_type` of llama-quant.cpp). It gives more
bits to the first and the last eighth of the blocks, to the projection that leads back from the
widest layer of a block (`down_proj`), and to layers outside the blocks (the head). The allocation
by bits alone is what quantizers with a bit budget do: least predicted loss within as many bytes as
the recommended plan takes, whatever that costs in time. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from autoquant.records import LayerChoice, LinearShape, Plan
from autoquant.solver.constraints import Bound
from autoquant.solver.limits import Limits
from autoquant.solver.planning import PlanContext, make_plan, with_reason
from autoquant.solver.solve import most_exact
from autoquant.solver.space import SearchSpace
from autoquant.solver.uniform import schemes, uniform_choice
from autoquant.solver.units import block_counts, block_of, ends_of

HEURISTIC_LABEL = "structural heuristic"
_MORE_BITS = 1.05  # less is scales, not bits


def structural_plan(space: SearchSpace, *, limits: Limits, max_loss: float | None) -> Plan | None:
    """Return the structural heuristic with the two formats that serve it best.

    Of all pairs of formats that are predicted to keep to the limits it takes the fastest (or
    smallest); if none does, the most exact. None if no two formats differ in size.

    Args:
        max_loss: The plan loss that the limits of quality are expected to allow (None: no limit).
    """
    names = [layer[0].name for layer in space.options]
    favoured = favoured_layers(names, [layer[0].shape for layer in space.options])
    reasons = _same_in_groups(dict(zip(names, favoured, strict=True)), space.context.bound)
    uniform = [
        [uniform_choice(space, layer, scheme) for layer in space.options]
        for scheme in schemes(space)
    ]
    sizes = [sum(choice.memory_bytes for choice in chosen) for chosen in uniform]
    sized = list(zip(uniform, sizes, strict=True))
    plans = [
        _mixed_plan(low, high, reasons, space.context)
        for low, low_size in sized
        for high, high_size in sized
        if high_size > low_size * _MORE_BITS
    ]
    within = [plan for plan in plans if _is_within(plan, space, limits, max_loss)]
    if not within:
        return min(plans, key=lambda plan: plan.prediction.loss, default=None)
    if limits.minimize == "time":
        return min(within, key=lambda plan: plan.prediction.request_ms)
    return min(within, key=lambda plan: plan.prediction.memory_bytes)


def _mixed_plan(
    low: Sequence[LayerChoice],
    high: Sequence[LayerChoice],
    reasons: Sequence[str],
    context: PlanContext,
) -> Plan:
    """Make the plan in which layers with a reason get their choice of `high`, the others `low`."""
    chosen = []
    for less, more, reason in zip(low, high, reasons, strict=True):
        if reason:
            chosen.append(with_reason(more, f"{reason}: more bits", context))
        else:
            chosen.append(with_reason(less, "fewer bits than the others", context))
    return make_plan(chosen, HEURISTIC_LABEL, "heuristic", context)


def favoured_layers(names: Sequence[str], shapes: Sequence[LinearShape]) -> list[str]:
    """Return for each layer why it gets more bits, or an empty text if it does not.

    The first number in a layer's name is that of its block.
    """
    places = [block_of(name) for name in names]
    counts = block_counts(names)
    widest: dict[tuple[str, int], int] = {}
    for place, shape in zip(places, shapes, strict=True):
        if place:
            widest[place] = max(widest.get(place, 0), shape.k)
    reasons = []
    for place, shape in zip(places, shapes, strict=True):
        if place is None:
            reasons.append("in no block")
            continue
        prefix, number = place
        ends = ends_of(counts[prefix])
        if not ends <= number < counts[prefix] - ends:
            reasons.append("in the first or last blocks")
        # It has the widest input of its block and makes it narrower: it leads back.
        elif shape.k == widest[place] > shape.n:
            reasons.append("down projection")
        else:
            reasons.append("")
    return reasons


def _same_in_groups(reasons: Mapping[str, str], bound: Bound) -> list[str]:
    """Return the reasons, in a group of one scheme the first that a layer of it has."""
    return [
        next(filter(None, (reasons.get(each, "") for each in bound.group_of(name))), reason)
        for name, reason in reasons.items()
    ]


def bits_plan(space: SearchSpace, recommended: Plan) -> Plan | None:
    """Return the plan of least predicted loss within the bytes of the recommended plan's layers.

    Time decides only between equals. None if constraints leave nothing so small.
    """
    budget_bytes = sum(layer.memory_bytes for layer in recommended.layers)
    picks = most_exact(space.problem, max_memory=budget_bytes)
    if picks is None:
        return None
    weights = sum(prod(layer[0].parameter_shape) for layer in space.options)
    bits = 8 * budget_bytes / weights
    reason = f"least predicted loss at {bits:.2f} bits a weight, whatever its latency"
    chosen = [with_reason(choice, reason, space.context) for choice in space.chosen(picks)]
    return make_plan(chosen, f"bits alone: {bits:.2f} a weight", "bits", space.context)


def _is_within(plan: Plan, space: SearchSpace, limits: Limits, max_loss: float | None) -> bool:
    fits = (
        limits.max_memory_bytes is None or plan.prediction.memory_bytes <= limits.max_memory_bytes
    )
    return fits and (max_loss is None or space.plan_loss(plan) <= max_loss)
