"""What the report holds: words and tables for the template, data for its script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoquant.records import LinearShape, Recording
from autoquant.report import units
from autoquant.report.front.geometry import LINE_LABEL, Front
from autoquant.report.html.about import about, workload_words
from autoquant.report.html.charts import latency_chart
from autoquant.report.html.command import search_command
from autoquant.report.html.front_chart import colour, front_chart, prediction_chart
from autoquant.report.html.kernels import KernelMap, kernel_map
from autoquant.report.html.plans import plans_object
from autoquant.report.html.points import PlanPoint, front_points
from autoquant.report.html.verdict import verdict
from autoquant.report.latency_plot import drawn_formats, format_lines
from autoquant.report.names import fold, shape_words
from autoquant.report.tables.plans import coverage_line, skipped_lines
from autoquant.report.tables.profile import untimed
from autoquant.report.words import (
    device_words,
    increase_words,
    measure_words,
    off_predictions,
    source_name,
)
from autoquant.study.study import Study

_OUTCOMES = {
    "unsupported": "cannot be used here",
    "bounded": "not tried: the roofline shows that it cannot win",
    "beaten": "far behind when tried",
    "incorrect": "computes wrong results",
    "failed": "failed",
}


def page_data(study: Study, database: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what fills the template and what the script reads.

    Numbers in tables are written out here. At least one plan must be proven.

    Args:
        database: The database, written as in a command.
    """
    points, kernels = front_points(study), kernel_map(study)
    shapes = {shape: format_lines(timings) for shape, timings in kernels.shapes.items()}
    drawn, not_drawn = drawn_formats(shapes)
    quality = measure_words(points[0].row)
    context = {
        **_front_context(points, study, quality, database),
        "kernel_tables": [_kernel_table(shape, kernels) for shape in kernels.shapes],
        "not_drawn": not_drawn,
        "has_roofline": kernels.roofline is not None,
        "database": database,
        "coverage": _coverage(study.facts.recording),
        "about": about(study),
        "command": search_command(study),
        "untimed": _untimed(kernels),
        "unproven": _unproven(study),
    }
    unquantized = next((p.plan for p in points if p.at.is_unquantized), None)
    data = {
        **plans_object(points, unquantized, study.facts.workload),
        "picked": next((point.index for point in points if point.row["recommended"]), 0),
        "front": front_chart(points, quality),
        "prediction": prediction_chart(points),
        "shapes": [
            latency_chart(shape, lines, drawn, kernels.roofline) for shape, lines in shapes.items()
        ],
    }
    return context, data


def _front_context(
    points: Sequence[PlanPoint], study: Study, quality: str, database: str
) -> dict[str, Any]:
    """Return the part of the template above the single plan."""
    facts = study.facts
    front = Front(tuple(point.at for point in points), quality)
    stored = [point.memory_bytes for point in points]
    off = off_predictions([point.row for point in points], database)
    return {
        "model": source_name(facts.source),
        "device": device_words(facts.device),
        "workload": workload_words(facts.workload),
        "verdict": verdict(points, facts),
        "quality": quality,
        "points": [_front_row(point) for point in points],
        "families": [(colour(each), each.glyph, each.name) for each in front.families],
        "line_label": LINE_LABEL,
        "memory_ends": [units.size(min(stored)), units.size(max(stored))],
        "left_out": front.note,
        "off": off[:1],
        "off_command": off[1].partition(": ")[2] if off else "",
    }


def _front_row(point: PlanPoint) -> dict[str, Any]:
    row = point.row
    return {
        "index": point.index,
        "number": point.number,
        "short": point.short_id,
        "label": row["label"],
        "glyph": point.at.family.glyph,
        "family": point.at.family.name,
        "request": units.duration_ms(point.request_ms),
        "speedup": f"{row['speedup']:.2f}x",
        "quality": units.digits(point.quality, 5),
        "increase": increase_words(row),
        "interval": units.interval(row["perplexity_increase_low"], row["perplexity_increase_high"]),
        "memory": units.size(point.memory_bytes),
        "formats": ", ".join(f"{count} x {name}" for name, count in point.formats.items()),
    }


def _kernel_table(shape: LinearShape, kernels: KernelMap) -> dict[str, Any]:
    """Return every timing of a shape, by m and latency."""
    called = ", ".join(pattern for pattern, _ in fold(kernels.names.get(shape, ())))
    timed = [row for row in kernels.shapes[shape] if row["latency_us"] is not None]
    return {
        "title": f"{shape_words(shape)}: {called or 'layers as one'}",
        "rows": [
            (
                str(row["m"]),
                f"{row['format']}/{row['kernel']}",
                units.duration_us(row["latency_us"]),
                units.duration_us(row["spread_us"]),
                units.MISSING
                if row["relative_error"] is None
                else units.digits(row["relative_error"], 2),
                row["reason"],
            )
            for row in sorted(timed, key=lambda row: (row["m"], row["latency_us"]))
        ],
    }


def _coverage(recording: Recording | None) -> dict[str, Any] | None:
    if recording is None:
        return None
    shares = [("weights", recording.weights_share)]
    shares += [(f"FLOPs in {phase}", share) for phase, share in recording.flops_share.items()]
    return {
        "line": coverage_line(recording),
        "shares": [(name, share, units.percent(share)) for name, share in shares],
        "skipped": [
            (name, units.percent(share), reason)
            for name, share, reason in skipped_lines(recording.skipped)
        ],
    }


def _untimed(kernels: KernelMap) -> list[tuple[str, ...]]:
    """Return (outcome, candidates, rows, reason) of candidates without a latency."""
    return [
        (
            _OUTCOMES[each.outcome],
            ", ".join(each.candidates),
            ", ".join(map(str, each.rows_m)),
            each.reason,
        )
        for each in untimed(kernels.rows())
    ]


def _unproven(study: Study) -> list[tuple[str, str, str]]:
    """Return (id, label, reason) of plans that could not be proven."""
    labels = {plan.plan_id: plan.label for plan in study.plans()}
    failed = study.store.failed_proofs(study.study_id)
    return [(plan_id, labels[plan_id], reason) for plan_id, reason in failed.items()]
