"""Uniform plans: the unquantized model, and one format everywhere. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoquant.records import ORIGINAL_LABEL, LayerChoice, Numerics, Plan
from autoquant.solver.planning import fastest_choice, make_plan, with_reason
from autoquant.solver.space import SearchSpace

FormatNumerics = tuple[str, str]
"""A format id, and the text of the numerics that it computes with."""


def original_plan(space: SearchSpace) -> Plan:
    """Return the plan of the unquantized model."""
    layers = [replace(choice, reason="the unquantized model") for choice in space.unquantized]
    return make_plan(layers, ORIGINAL_LABEL, "original", space.context)


def uniform_plans(space: SearchSpace) -> list[Plan]:
    """Return one plan for each format and each of its numerics.

    Every layer that can have it gets it, by its fastest route. The others stay unquantized, or get
    the first format that they can have if a constraint bars that.
    """
    original = space.unquantized[0].format
    keys = [key for key in format_numerics(space) if key[0] != original]
    plans: dict[str, Plan] = {}
    for key in keys:
        chosen = [uniform_choice(space, layer, key) for layer in space.options]
        numerics = Numerics.parse(key[1])
        label = f"uniform {numerics.values} {numerics.activation}"
        plan = make_plan(chosen, label, "uniform", space.context)
        plans.setdefault(plan.plan_id, plan)
    return list(plans.values())


def format_numerics(space: SearchSpace) -> list[FormatNumerics]:
    """Return every format with each of its numerics that some layer has as an option by itself."""
    alone = (choice for layer in space.options for choice in layer if not choice.joined)
    return list(dict.fromkeys((choice.format, choice.numerics) for choice in alone))


def uniform_choice(
    space: SearchSpace, layer: Sequence[LayerChoice], key: FormatNumerics
) -> LayerChoice:
    """Return a layer's fastest option of a format and numerics.

    A layer gets its first format if it cannot have this one, or if another layer of its group
    cannot. That is the unquantized one, unless a constraint bars it.
    """
    fmt, numerics = key
    context = space.context
    alone = [choice for choice in layer if not choice.joined]
    same = [choice for choice in alone if choice.format == fmt]
    exact = [choice for choice in same if choice.numerics == numerics] or same
    if exact and _group_can_have(space, layer, fmt):
        best, why = fastest_choice(exact, context.workload), f"every layer {fmt}"
    else:
        first = [choice for choice in alone if choice.format == alone[0].format]
        best = fastest_choice(first, context.workload)
        constrained = layer[0].name in context.bound.reasons
        why = "" if constrained else f"{fmt} cannot be used or never pays here"
    return with_reason(best, why, context)


def _group_can_have(space: SearchSpace, layer: Sequence[LayerChoice], format_id: str) -> bool:
    """Check whether all layers that get the same format as this one can have it."""
    group = space.context.bound.group_of(layer[0].name)
    members = [other for other in space.options if other[0].name in group] if group else []
    for member in members:
        alone = [choice.format for choice in member if not choice.joined]
        if format_id not in alone:
            return False
    return True
