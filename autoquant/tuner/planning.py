"""From scored choices to plans: the exact front, the uniform plans, and which of them are worth proving."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from autoquant.errors import PlanError
from autoquant.records import (
    ORIGINAL_LABEL,
    LayerChoice,
    Objective,
    Plan,
    PlanKind,
    Prediction,
    Route,
    Workload,
    content_key,
    request_time,
)
from autoquant.tuner.additivity import ADDITION, LossMap
from autoquant.tuner.alternatives import next_faster, next_more_exact
from autoquant.tuner.constraints import UNBOUND, Bound
from autoquant.tuner.solve import Picks, Problem, fastest, front, smallest, undominated

_TOLD_APART = 64.0
"""A plan that costs this part of what the limit allows cannot be told from the unquantized model by its quality."""


class Joins(Protocol):
    """Joins layers of a plan; see `autoquant.tuner.fusion`."""

    def join(self, choices: Sequence[LayerChoice]) -> list[LayerChoice]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanContext:
    """What every plan of a study has in common.

    Attributes:
        other_bytes: Bytes of the parameters that are not searched.
        rest_ms: Milliseconds of a request outside the linears, as measured on the unquantized model (0 until then).
        original_request_ms: What a request of the unquantized model took then.
        fusion: Joins layers that were chosen one by one and read the same input; None where that is not wanted.
        loss_map: From the layers' summed losses to the loss of a plan.
        bound: Which layers get the same format, and why some could not get just anything.
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
    """Microseconds that the layer takes in one request."""
    return request_time(choice.latency_us, workload.calls())


def request_ms(choice: LayerChoice, workload: Workload) -> float:
    """Milliseconds that one layer takes in one request."""
    return request_us(choice, workload) / 1e3


def make_problem(
    options: Sequence[Sequence[LayerChoice]], workload: Workload, groups: Sequence[Sequence[str]] = ()
) -> Problem:
    """The additive model: milliseconds per request, loss and bytes of every option of every layer.

    Options that compute layers as one are taken by all of them or by none.

    Args:
        groups: Names of layers that get the same format.
    """
    together: dict[tuple[tuple[str, ...], str, Route], list[tuple[int, int]]] = {}
    for position, layer in enumerate(options):
        for index, choice in enumerate(layer):
            if choice.joined:
                together.setdefault((choice.joined, choice.format, choice.route), []).append((position, index))
    return Problem.build(
        [[(request_ms(c, workload), c.loss, float(c.memory_bytes)) for c in layer] for layer in options],
        list(together.values()),
        _same_format(options, groups),
    )


def _same_format(
    options: Sequence[Sequence[LayerChoice]], groups: Sequence[Sequence[str]]
) -> list[list[tuple[int, list[int]]]]:
    """For each group and format the options of each member that have it."""
    positions = {layer[0].name: position for position, layer in enumerate(options)}
    found: list[list[tuple[int, list[int]]]] = []
    for group in groups:
        members = [positions[name] for name in group]
        formats = dict.fromkeys(choice.format for member in members for choice in options[member])
        found += [
            [(m, [i for i, choice in enumerate(options[m]) if choice.format == fmt]) for m in members]
            for fmt in formats
        ]
    return found


def make_plan(choices: Sequence[LayerChoice], label: str, kind: PlanKind, context: PlanContext) -> Plan:
    """A plan of these choices. Its id is a hash of what it does, so the same plan has the same id in every run."""
    if context.fusion is not None:
        choices = context.fusion.join(choices)
    does = [(c.name, c.format, [(s.upper_m, s.kernel) for s in c.route], *filter(None, [c.joined])) for c in choices]
    return Plan(
        plan_id=content_key([context.study_id, does], 8),
        study_id=context.study_id,
        label=label,
        kind=kind,
        model_hash=context.model_hash,
        dtype=context.dtype,
        layers=tuple(choices),
        prediction=predict(choices, context),
    )


def predict(choices: Sequence[LayerChoice], context: PlanContext) -> Prediction:
    """Sums of the additive model, the loss as its map makes it of the sum."""
    linear_ms = sum(request_ms(choice, context.workload) for choice in choices)
    return Prediction(
        request_ms=linear_ms + context.rest_ms,
        linear_ms=linear_ms,
        loss=context.loss_map.plan_loss(sum(choice.loss for choice in choices)),
        memory_bytes=sum(choice.memory_bytes for choice in choices) + context.other_bytes,
        original_request_ms=context.original_request_ms,
    )


def original_plan(originals: Sequence[LayerChoice], context: PlanContext) -> Plan:
    """The model as it is."""
    reason = "the unquantized model"
    return make_plan([replace(choice, reason=reason) for choice in originals], ORIGINAL_LABEL, "original", context)


def uniform_plans(
    options: Sequence[Sequence[LayerChoice]], originals: Sequence[LayerChoice], context: PlanContext
) -> list[Plan]:
    """For each format and each of its numerics: every layer that can have it gets it, by its fastest route.

    The others stay as they are; where a constraint does not let them, they get the first format that they can have.
    """
    keys = dict.fromkeys(
        (choice.format, choice.numerics)
        for layer in options
        for choice in layer
        if not choice.joined and choice.format != originals[0].format
    )
    plans: dict[str, Plan] = {}
    for fmt, numerics in keys:
        chosen = [uniform_choice(layer, (fmt, numerics), options, context) for layer in options]
        label = f"uniform {numerics.replace('+', ' ')}"
        plan = make_plan(chosen, label, "uniform", context)
        plans.setdefault(plan.plan_id, plan)
    return list(plans.values())


def uniform_choice(
    layer: Sequence[LayerChoice],
    key: tuple[str, str],
    options: Sequence[Sequence[LayerChoice]],
    context: PlanContext,
) -> LayerChoice:
    """The fastest route of a layer for a format and numerics, as one of `options`: all layers that can have it get it.

    A layer that cannot, or one of whose group cannot, gets its first format: the unquantized one unless a constraint bars that.
    """
    fmt, numerics = key
    alone = [choice for choice in layer if not choice.joined]
    same = [choice for choice in alone if choice.format == fmt]
    exact = [choice for choice in same if choice.numerics == numerics] or same
    group = context.bound.group_of(layer[0].name)
    others = [other for other in options if other[0].name in group] if group else []
    if exact and all(any(c.format == fmt and not c.joined for c in other) for other in others):
        best, why = _fastest_of(exact, context.workload), f"every layer {fmt}"
    else:
        best = _fastest_of([choice for choice in alone if choice.format == alone[0].format], context.workload)
        why = "" if layer[0].name in context.bound.reasons else f"{fmt} cannot be used or never pays here"
    return because(best, why, context)


def because(choice: LayerChoice, why: str, context: PlanContext) -> LayerChoice:
    """The choice with its reason: what constrains the layer, then why."""
    return replace(choice, reason="; ".join(filter(None, [context.bound.reasons.get(choice.name), why])))


def _fastest_of(choices: Sequence[LayerChoice], workload: Workload) -> LayerChoice:
    return min(choices, key=lambda choice: request_us(choice, workload))


def front_plans(
    options: Sequence[Sequence[LayerChoice]],
    context: PlanContext,
    *,
    count: int,
    max_loss: float | None,
    max_memory_bytes: int | None,
    minimize: Objective = "time",
) -> list[Plan]:
    """Plans of the exact front, spread over it, the fastest (or smallest) one within the limits among them and first.

    Args:
        max_loss: The plan loss that the user's limit on quality is expected to allow (None: no limit).
    """
    problem = make_problem(options, context.workload, context.bound.groups)
    chosen: list[Picks] = []
    summed = None if max_loss is None else context.loss_map.summed(max_loss)
    target = least(problem, context, minimize, max_loss=summed, max_memory_bytes=max_memory_bytes)
    if target is not None:
        chosen.append(target)
    points = front(problem)
    least_loss = summed / _TOLD_APART if summed is not None and math.isfinite(summed) else 0.0
    chosen += spread(problem, undominated(problem, points), count - len(chosen), taken=chosen, least_loss=least_loss)
    wanted = f"front: {'fastest' if minimize == 'time' else 'smallest'} within limits"
    plans = []
    for number, picks in enumerate(chosen, start=1):
        label = wanted if target is not None and number == 1 else f"front {number}"
        plans.append(plan_of(options, picks, label, "front", context))
    return plans


def plan_of(
    options: Sequence[Sequence[LayerChoice]], picks: Picks, label: str, kind: PlanKind, context: PlanContext
) -> Plan:
    """The plan that takes these options, each with the reason why."""
    layers = [replace(layer[i], reason=explain(layer, i, context)) for layer, i in zip(options, picks, strict=True)]
    return make_plan(layers, label, kind, context)


def about_options(context: PlanContext, *, logarithmic: bool) -> dict[str, Any]:
    """What the store keeps beside the options, so that plans can be made without the model."""
    return {
        "other_bytes": context.other_bytes,
        "rest_ms": context.rest_ms,
        "original_request_ms": context.original_request_ms,
        "dtype": context.dtype,
        "curvature": context.loss_map.curvature,
        "groups": [list(group) for group in context.bound.groups],
        "reasons": dict(context.bound.reasons),
        "logarithmic": logarithmic,
    }


def context_of(about: Mapping[str, Any], *, study_id: str, model_hash: str, workload: Workload) -> PlanContext:
    """The context that `about_options` describes."""
    return PlanContext(
        study_id=study_id,
        model_hash=model_hash,
        dtype=about["dtype"],
        workload=workload,
        other_bytes=about["other_bytes"],
        rest_ms=about["rest_ms"],
        original_request_ms=about.get("original_request_ms"),
        loss_map=LossMap(about["curvature"]),
        bound=Bound(tuple(tuple(group) for group in about["groups"]), about["reasons"]),
    )


def check_memory(options: Sequence[Sequence[LayerChoice]], context: PlanContext, max_memory_bytes: int | None) -> None:
    """Refuse a limit that no choice of formats can keep to.

    Raises:
        PlanError: The smallest of all plans is larger.
    """
    if max_memory_bytes is None:
        return
    picks = smallest(make_problem(options, context.workload, context.bound.groups))
    assert picks is not None  # without a limit there is always a plan
    least_bytes = context.other_bytes + sum(layer[i].memory_bytes for layer, i in zip(options, picks, strict=True))
    if least_bytes > max_memory_bytes:
        constrained = ", or fewer of --keep, --pin and --fusable" if context.bound.reasons else ""
        raise PlanError(
            f"no plan is as small as {max_memory_bytes:,} bytes: the smallest formats take {least_bytes:,}; allow at least"
            f" that with --max-memory{constrained}"
        )


def least(
    problem: Problem,
    context: PlanContext,
    minimize: Objective,
    *,
    max_loss: float | None,
    max_memory_bytes: int | None,
) -> Picks | None:
    """The fastest or the smallest solution within the limits, or None where there is none.

    Args:
        max_memory_bytes: Limit on the bytes of all parameters, those that are not searched among them.
    """
    budget = None if max_memory_bytes is None else max_memory_bytes - context.other_bytes
    if minimize == "time":
        return fastest(problem, max_loss=max_loss, max_memory=budget)
    picks = smallest(problem, max_loss=max_loss)
    return picks if picks is None or budget is None or problem.totals(picks)[2] <= budget else None


def spread(
    problem: Problem, points: Sequence[Picks], count: int, taken: Sequence[Picks] = (), least_loss: float = 0.0
) -> list[Picks]:
    """`count` of the points, each as far as can be from those already chosen (time, log of loss and memory, each scaled to 1).

    Args:
        least_loss: Losses below it count as if they were this.
    """
    pool = [p for p in points if p not in taken]
    if not pool or count <= 0:
        return []
    totals = np.array([problem.totals(p) for p in [*pool, *taken]])
    positive = totals[:, 1][totals[:, 1] > 0]
    floor = max(positive.min() * 0.1 if len(positive) else 1.0, least_loss)
    totals[:, 1] = np.log(np.maximum(totals[:, 1], floor))
    span = totals.max(axis=0) - totals.min(axis=0)
    where = (totals - totals.min(axis=0)) / np.where(span > 0, span, 1.0)
    own, fixed = where[: len(pool)], where[len(pool) :]
    chosen: list[int] = []
    distance = np.full(len(pool), np.inf)
    for other in fixed:
        distance = np.minimum(distance, np.linalg.norm(own - other, axis=1))
    for _ in range(min(count, len(pool))):
        best = int(np.argmin(own[:, 0])) if not len(fixed) and not chosen else int(np.argmax(distance))
        chosen.append(best)
        distance = np.minimum(distance, np.linalg.norm(own - own[best], axis=1))
        distance[best] = -1.0
    return [pool[i] for i in chosen]


def explain(layer: Sequence[LayerChoice], index: int, context: PlanContext) -> str:
    """Why this option, in words: what constrains it, and what the next more exact and the next faster one would have cost."""
    own, workload = layer[index], context.workload
    constrained = context.bound.reasons.get(own.name)
    parts = [constrained] if constrained else []
    if other := next_more_exact(own, layer, workload):
        cost_us = request_us(other, workload) - request_us(own, workload)
        parts.append(
            f"more exact {_called(other)} would take {cost_us:+.0f} us a request for {other.loss - own.loss:+.2g} loss"
        )
    if other := next_faster(own, layer, workload):
        gain_us = request_us(other, workload) - request_us(own, workload)
        parts.append(f"faster {_called(other)} would take {gain_us:+.0f} us for {other.loss - own.loss:+.2g} loss")
    return "; ".join(parts) or "fastest and most exact of all"


def _called(choice: LayerChoice) -> str:
    return f"{choice.format} as one with others" if choice.joined else choice.format


def with_multipliers(
    options: Sequence[Sequence[LayerChoice]], multiplier: Mapping[str, float]
) -> list[list[LayerChoice]]:
    """The options with each layer's losses scaled by its own factor."""
    return [[replace(c, loss=c.loss * multiplier.get(c.name, 1.0)) for c in layer] for layer in options]
