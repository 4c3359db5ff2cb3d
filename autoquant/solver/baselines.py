"""Plans that a searched one has to beat: what one would choose without measuring each layer's latency. Proven like any other.

The structural heuristic follows llama.cpp's K-quant mixtures (`llama_tensor_get_type` of llama-quant.cpp): more bits for the
first and the last eighth of the blocks, for the projection that leads back from the widest layer of a block (`down_proj`), and
for what is in no block (the head). The allocation by bits alone is what quantizers with a bit budget do: least predicted loss
within as many bytes as the recommended plan takes, whatever that costs in time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from autoquant.records import LayerChoice, LinearShape, Plan
from autoquant.solver.limits import Limits
from autoquant.solver.planning import PlanContext, because, make_plan, make_problem, uniform_choice
from autoquant.solver.solve import most_exact

HEURISTIC_LABEL = "structural heuristic"
_MORE_BITS = 1.05  # less is scales, not bits
_END_SHARE = 8  # an eighth of the blocks at each end


def structural_plan(
    options: Sequence[Sequence[LayerChoice]], context: PlanContext, *, limits: Limits, max_loss: float | None
) -> Plan | None:
    """The structural heuristic with the two formats that serve it best, or None where there are no two of different size.

    Of all pairs that are predicted to keep to the limits the fastest (or smallest); where none does, the most exact.

    Args:
        max_loss: The plan loss that the limits of quality are expected to allow (None: no limit).
    """
    favoured = favoured_layers([layer[0].name for layer in options], [layer[0].shape for layer in options])
    keys = dict.fromkeys((choice.format, choice.numerics) for layer in options for choice in layer if not choice.joined)
    uniform = [[uniform_choice(layer, key, options, context) for layer in options] for key in keys]
    sizes = [sum(choice.memory_bytes for choice in chosen) for chosen in uniform]
    plans = []
    for low, low_size in zip(uniform, sizes, strict=True):
        for high, high_size in zip(uniform, sizes, strict=True):
            if high_size > low_size * _MORE_BITS:
                chosen = [
                    because(more, f"{why}: more bits", context)
                    if why
                    else because(less, "fewer bits than the others", context)
                    for less, more, why in zip(low, high, favoured, strict=True)
                ]
                plans.append(make_plan(chosen, HEURISTIC_LABEL, "heuristic", context))
    within = [plan for plan in plans if _is_within(plan, limits, max_loss)]
    if not within:
        return min(plans, key=lambda plan: plan.prediction.loss, default=None)
    time = limits.minimize == "time"
    return min(within, key=lambda plan: plan.prediction.request_ms if time else plan.prediction.memory_bytes)


def favoured_layers(names: Sequence[str], shapes: Sequence[LinearShape]) -> list[str]:
    """For each layer why it gets more bits, empty where it does not. Blocks are told by the first number in a name."""
    places = [_block(name) for name in names]
    last = {
        prefix: max(n for p in places if p and p[0] == prefix for n in [p[1]]) for prefix in {p[0] for p in places if p}
    }
    widest: dict[tuple[str, int], int] = {}
    for place, shape in zip(places, shapes, strict=True):
        if place:
            widest[place] = max(widest.get(place, 0), shape.k)
    reasons = []
    for place, shape in zip(places, shapes, strict=True):
        if place is None:
            reasons.append("in no block")
            continue
        ends = max(1, (last[place[0]] + 1) // _END_SHARE)
        if not ends <= place[1] <= last[place[0]] - ends:
            reasons.append("in the first or last blocks")
        else:
            reasons.append("down projection" if shape.k == widest[place] > shape.n else "")
    return reasons


def bits_plan(options: Sequence[Sequence[LayerChoice]], context: PlanContext, recommended: Plan) -> Plan | None:
    """Least predicted loss within the bytes that the recommended plan's layers take; time decides between equals only.

    None where constraints leave nothing so small.
    """
    budget_bytes = sum(layer.memory_bytes for layer in recommended.layers)
    problem = make_problem(options, context.workload, context.bound.groups)
    picks = most_exact(problem, max_memory=budget_bytes)
    if picks is None:
        return None
    weights = sum(layer[0].shape.n * layer[0].shape.k for layer in options)
    bits = 8 * budget_bytes / weights
    reason = f"least predicted loss at {bits:.2f} bits a weight, whatever its latency"
    chosen = [because(layer[i], reason, context) for layer, i in zip(options, picks, strict=True)]
    return make_plan(chosen, f"bits alone: {bits:.2f} a weight", "bits", context)


def _is_within(plan: Plan, limits: Limits, max_loss: float | None) -> bool:
    fits = limits.max_memory_bytes is None or plan.prediction.memory_bytes <= limits.max_memory_bytes
    return fits and (max_loss is None or plan.prediction.loss <= max_loss)


def _block(name: str) -> tuple[str, int] | None:
    """What comes before the first number in a name, and that number."""
    match = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", name)
    return (match[1] or "", int(match[2])) if match else None
