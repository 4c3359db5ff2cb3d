"""Uniform plans: the unquantized model, and one format everywhere. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoquant.records import ORIGINAL_LABEL, LayerChoice, Numerics, Plan
from autoquant.solver.constraints import Scheme, scheme_of
from autoquant.solver.planning import fastest_choice, make_plan, request_us, with_reason
from autoquant.solver.space import SearchSpace


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
    keys = [key for key in schemes(space) if key[0] != original]
    plans: dict[str, Plan] = {}
    for key in keys:
        chosen = [uniform_choice(space, layer, key) for layer in space.options]
        plan = make_plan(chosen, uniform_label(key), "uniform", space.context)
        plans.setdefault(plan.plan_id, plan)
    return list(plans.values())


def uniform_label(scheme: Scheme) -> str:
    """Return the label of the uniform plan of a format and numerics."""
    numerics = Numerics.parse(scheme[1])
    return f"uniform {numerics.values} {numerics.activation}"


def schemes(space: SearchSpace) -> list[Scheme]:
    """Return every format with each of its numerics that some layer has as an option by itself."""
    return list(dict.fromkeys(scheme for layer in space.options for scheme in _schemes(layer)))


def uniform_choice(space: SearchSpace, layer: Sequence[LayerChoice], scheme: Scheme) -> LayerChoice:
    """Return a layer's fastest option of a format and numerics.

    Other numerics do if it cannot have these. A layer gets its first format if it cannot have this
    one. That is the unquantized one, unless a constraint bars it. Layers of a group get what all
    of them can have.
    """
    context = space.context
    members = _members(space, layer)
    common = [each for each in _schemes(layer) if all(each in _schemes(m) for m in members)]
    same = [each for each in common if each[0] == scheme[0]]
    first = [each for each in common if each[0] == common[0][0]]
    wanted = [scheme] if scheme in same else same or first
    best = min(
        (_fastest(space, members, each) for each in wanted),
        key=lambda chosen: sum(request_us(choice, context.workload) for choice in chosen),
    )[members.index(layer)]
    constrained = layer[0].name in context.bound.reasons
    if same:
        why = f"every layer {scheme[0]}"
    else:
        why = "" if constrained else f"{scheme[0]} cannot be used or never pays here"
    return with_reason(best, why, context)


def _schemes(layer: Sequence[LayerChoice]) -> list[Scheme]:
    """Return the schemes that a layer has as options by itself."""
    return list(dict.fromkeys(scheme_of(choice) for choice in layer if not choice.joined))


def _members(space: SearchSpace, layer: Sequence[LayerChoice]) -> list[Sequence[LayerChoice]]:
    """Return the layers that get the same scheme as this one, itself among them."""
    group = space.context.bound.group_of(layer[0].name)
    return [other for other in space.options if other[0].name in group] or [layer]


def _fastest(
    space: SearchSpace, members: Sequence[Sequence[LayerChoice]], scheme: Scheme
) -> list[LayerChoice]:
    """Return the fastest option of a scheme in each of the layers."""
    return [
        fastest_choice(
            [choice for choice in member if not choice.joined and scheme_of(choice) == scheme],
            space.context.workload,
        )
        for member in members
    ]
