"""A proven plan on the page: formats by layer, shares of time and loss, and predictions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

from autoquant.records import LayerChoice, Plan, Workload, request_time
from autoquant.report import units
from autoquant.report.html.charts import share_chart
from autoquant.report.html.layer_grid import LayerGrid, layer_grid
from autoquant.report.html.points import PlanPoint
from autoquant.report.names import fold, layer_words
from autoquant.report.tables.plans import route_text
from autoquant.study.compare import check_same_layers

_ELSE = "everything else"
_COLOURS = 8
_CODE = re.compile(r"([a-zA-Z])[a-zA-Z]*(\d+)")


def plans_object(
    points: Sequence[PlanPoint], original: Plan | None, workload: Workload
) -> dict[str, Any]:
    """Return all plans for `page.js`.

    A choice that plans share is written once: plans hold indices into `choices`.

    Raises:
        PlanError: The plans are not of the same layers.
    """
    check_same_layers([point.plan for point in points])
    layers = points[0].plan.layers
    grid = layer_grid(layer.name for layer in layers)
    kept = {layer.name: layer.format for layer in original.layers} if original else {}
    used = (layer.format for point in points for layer in point.plan.layers)
    formats = list(dict.fromkeys([*kept.values(), *used]))
    choices: dict[str, int] = {}
    plans = []
    for point in points:
        own = {layer.name: layer for layer in point.plan.layers}
        objects = (_choice_object(own[layer.name], formats, workload) for layer in layers)
        places = [
            choices.setdefault(json.dumps([index, each]), len(choices))
            for index, each in enumerate(objects)
        ]
        plans.append(_plan_object(point, grid, kept, original, workload) | {"choices": places})
    return {
        "rows": list(grid.rows),
        "columns": list(grid.columns),
        "layers": [_layer_object(layer, grid) for layer in layers],
        "formats": format_objects(formats, set(kept.values())),
        "choices": [json.loads(text)[1] for text in choices],
        "plans": plans,
    }


def format_objects(formats: Sequence[str], unquantized: Collection[str]) -> list[dict[str, Any]]:
    """Return the formats with a short text and a colour, which is 0 for unquantized ones."""
    found = []
    quantized = 0
    for name, code in zip(formats, _codes(formats), strict=True):
        colour = 0
        if name not in unquantized:
            colour = quantized % _COLOURS + 1
            quantized += 1
        found.append(
            {"id": name, "code": code, "unquantized": name in unquantized, "colour": colour}
        )
    return found


def _codes(formats: Sequence[str]) -> list[str]:
    """Return a short text for each format, with a letter where several have the same."""
    short = [_short(name) for name in formats]
    codes = []
    for position, code in enumerate(short):
        number = short[:position].count(code)
        letter = chr(ord("a") + number) if short.count(code) > 1 else ""
        codes.append(f"{code}{letter}")
    return codes


def _short(name: str) -> str:
    """Return a short text such as `i8` for `int8-row/plain`."""
    match = _CODE.match(name)
    return f"{match[1].lower()}{match[2]}" if match else name[:2]


def _layer_object(layer: LayerChoice, grid: LayerGrid) -> dict[str, Any]:
    row, column = grid.places[layer.name]
    return {"name": layer.name, "row": row, "column": column, "shape": layer_words(layer)}


def _choice_object(
    layer: LayerChoice, formats: Sequence[str], workload: Workload
) -> dict[str, Any]:
    joined = [name.rpartition(".")[2] for name in layer.joined if name != layer.name]
    with_others = f", as one with {', '.join(joined)}" if joined else ""
    return {
        "format": formats.index(layer.format),
        "route": route_text(layer.route).replace("\n", ", ") + with_others,
        "time": units.duration_us(request_time(layer.latency_us, workload.calls())),
        "loss": units.digits(layer.loss, 2),
        "memory": units.size(layer.memory_bytes),
        "reason": layer.reason,
    }


def _plan_object(
    point: PlanPoint,
    grid: LayerGrid,
    kept: dict[str, str],
    original: Plan | None,
    workload: Workload,
) -> dict[str, Any]:
    plan, row, proof = point.plan, point.row, point.proof
    before = type_times_ms(original, grid, workload) if original else {}
    return {
        "id": plan.plan_id,
        "short": point.short_id,
        "number": point.number,
        "label": row["label"],
        "family": point.at.family.name,
        "glyph": point.at.family.glyph,
        "x": point.request_ms if point.drawable else None,
        "y": point.quality if point.drawable else None,
        "time_ms": point.request_ms,
        "predicted_ms": row["predicted_request_ms"],
        "facts": [
            ["Request", _request_words(point)],
            ["Quality", _quality_words(point)],
            ["Memory", units.size(point.memory_bytes)],
            ["Predicted", _prediction_words(point)],
            ["Run", "; ".join([proof.execution, *proof.notes])],
        ],
        "phases": _phases(point, workload),
        "left_alone": left_alone(plan, kept),
        "time": _time_chart(plan, grid, workload, before),
        "loss": share_chart("Predicted loss", grid.rows, {"loss": _type_losses(plan, grid)}, ()),
        "shares": _shares(plan, grid, workload, before),
    }


def _request_words(point: PlanPoint) -> str:
    time, speedup = units.duration_ms(point.request_ms), point.row["speedup"]
    return f"{time}, {speedup:.2f}x as fast as unquantized"


def _quality_words(point: PlanPoint) -> str:
    row = point.row
    ends = units.interval(row["perplexity_increase_low"], row["perplexity_increase_high"])
    divergence = "" if row["kl"] is None else f", KL {units.digits(row['kl'])}"
    return f"{point.increase_text} (95 % {ends}){divergence}"


def _prediction_words(point: PlanPoint) -> str:
    predicted, measured = point.row["predicted_request_ms"], point.request_ms
    linears = units.duration_ms(point.plan.prediction.linear_ms)
    loss = units.digits(point.plan.prediction.loss)
    error = f"{predicted / measured - 1:+.0%} against measured"
    return (
        f"{units.duration_ms(predicted)} a request ({error}), of it {linears} in these layers;"
        f" loss {loss}"
    )


def _phases(point: PlanPoint, workload: Workload) -> list[list[str]]:
    """Return a row for each phase: name, runs, predicted layers, measured model, unquantized."""
    proof = point.proof
    rows = []
    for phase in workload.phases:
        layers_us = sum(layer.latency_us.get(phase.name, 0.0) for layer in point.plan.layers)
        measured, before = proof.phase_ms.get(phase.name), proof.original_phase_ms.get(phase.name)
        times = [
            units.MISSING if time is None else units.duration_ms(time)
            for time in (measured, before)
        ]
        rows.append([phase.name, str(phase.calls), units.duration_us(layers_us), *times])
    return rows


def left_alone(plan: Plan, kept: dict[str, str]) -> list[list[str]]:
    """Return the layers that the plan leaves unquantized, as [names, number and shape, why]."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for layer in plan.layers:
        if layer.format == kept.get(layer.name):
            by_reason.setdefault((layer_words(layer), layer.reason), []).append(layer.name)
    return [
        [
            pattern,
            f"{len(names)} of {shape}" if len(names) > 1 else shape,
            reason or "no reason kept",
        ]
        for (shape, reason), members in by_reason.items()
        for pattern, names in fold(members)
    ]


def type_times_ms(plan: Plan, grid: LayerGrid, workload: Workload) -> dict[str, list[float]]:
    """Return the predicted milliseconds of one request by phase, for each type of layer."""
    times = {phase.name: [0.0] * len(grid.rows) for phase in workload.phases}
    calls = workload.calls()
    for layer in plan.layers:
        row, _block = grid.places[layer.name]
        for phase, latency_us in layer.latency_us.items():
            times[phase][row] += calls[phase] * latency_us / 1e3
    return times


def _rest_ms(plan: Plan, times: dict[str, list[float]]) -> float:
    """Return what the prediction adds to the layers: attention, norms, glue."""
    return plan.prediction.request_ms - sum(map(sum, times.values()))


def _time_chart(
    plan: Plan, grid: LayerGrid, workload: Workload, before: dict[str, list[float]]
) -> dict[str, Any]:
    times = type_times_ms(plan, grid, workload)
    parts: dict[str, list[float | None]] = {
        phase: [*values, None] for phase, values in times.items()
    }
    parts[_ELSE] = [*(None for _ in grid.rows), _rest_ms(plan, times)]
    whole = [sum(values) for values in zip(*before.values(), strict=True)]
    return share_chart("Predicted time in one request [ms]", [*grid.rows, _ELSE], parts, whole)


def _type_losses(plan: Plan, grid: LayerGrid) -> list[float]:
    losses = [0.0] * len(grid.rows)
    for layer in plan.layers:
        losses[grid.places[layer.name][0]] += layer.loss
    return losses


def _shares(
    plan: Plan, grid: LayerGrid, workload: Workload, before: dict[str, list[float]]
) -> dict[str, Any]:
    """Return the numbers of both charts as a table."""
    times, losses = type_times_ms(plan, grid, workload), _type_losses(plan, grid)
    whole = [sum(values) for values in zip(*before.values(), strict=True)] or [math.nan] * len(
        grid.rows
    )
    rows = [
        [
            label,
            *(units.duration_ms(values[row]) for values in times.values()),
            _time(whole[row]),
            units.digits(losses[row]),
        ]
        for row, label in enumerate(grid.rows)
    ]
    rest = [_ELSE, *("" for _ in times), "", ""]
    rest[1] = f"{units.duration_ms(_rest_ms(plan, times))}, all phases"
    return {
        "heads": [*(f"Time, {phase}" for phase in times), "Unquantized", "Loss"],
        "rows": [*rows, rest],
    }


def _time(milliseconds: float) -> str:
    return units.duration_ms(milliseconds) if math.isfinite(milliseconds) else units.MISSING
