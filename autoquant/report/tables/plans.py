"""Tables for the terminal: the front, a plan's layers, candidates, coverage. All fit 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.table import Table
from rich.text import Text

from autoquant.records import LayerChoice, Plan, Recording, Route, Skipped
from autoquant.report import units
from autoquant.report.names import fold, layer_words
from autoquant.report.tables.layout import WIDE, Column, plain_table
from autoquant.report.words import increase_heading, increase_words

_LEGEND = "> recommended   * on the front: no other is faster, better and smaller at once"
_TIES_LEGEND = "> recommended   ~ a tie with it   * on the front: none is better in everything"
_BEYOND_LEGEND = "! beyond the limits, which the interval on the selection part has to keep to"
_REFUSED_LEGEND = "x not recommended for how it runs for its user, see below"
_MOST, _NAMED = 0.5, 3
_SKIPPED_ROWS = 12


class CandidateLine(Protocol):
    """What the table of candidates reads from a candidate's status."""

    @property
    def format(self) -> str: ...

    @property
    def kernel(self) -> str: ...

    @property
    def numerics(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def usable(self) -> bool: ...

    @property
    def by_default(self) -> bool: ...

    @property
    def reason(self) -> str: ...


def short_ids(plan_ids: Sequence[str], at_least: int = 6) -> dict[str, str]:
    """Return the shortest prefixes of one length that are unique, by plan id."""
    longest = max((len(plan_id) for plan_id in plan_ids), default=0)
    for length in range(at_least, longest + 1):
        if len({plan_id[:length] for plan_id in plan_ids}) == len(set(plan_ids)):
            return {plan_id: plan_id[:length] for plan_id in plan_ids}
    return {plan_id: plan_id for plan_id in plan_ids}


def front_table(rows: Sequence[Mapping[str, Any]], width: int = 80) -> Table:
    """Return a table of proven plans, fastest first.

    Args:
        rows: The rows of `Study.rows`.
    """
    rivals = ties_of_recommended(rows)
    ids = short_ids([row["plan_id"] for row in rows])
    table = plain_table(caption=_legend(rows, rivals))
    table.add_column("", no_wrap=True, width=2)
    table.add_column("Plan", no_wrap=True)
    table.add_column("Label", overflow="fold", ratio=1)
    columns = _front_columns(rows, wide=width >= WIDE)
    for column in columns:
        table.add_column(Text(column.head), justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        cells = [_mark(row, rivals), ids[row["plan_id"]], row["label"]]
        cells += [column.cells[number] for column in columns]
        style = "bold" if row["recommended"] else "" if row["on_front"] else "dim"
        table.add_row(*map(Text, cells), style=style)
    return table


def _legend(rows: Sequence[Mapping[str, Any]], rivals: Sequence[Mapping[str, Any]]) -> str:
    lines = [_TIES_LEGEND if rivals else _LEGEND]
    if not all(row["within_limits"] for row in rows):
        lines.append(_BEYOND_LEGEND)
    if any(row.get("not_recommended") for row in rows):
        lines.append(_REFUSED_LEGEND)
    return "\n".join(lines)


def _front_columns(rows: Sequence[Mapping[str, Any]], *, wide: bool) -> list[Column]:
    """Return the columns of numbers. A narrow terminal gets fewer."""
    unit, times = units.common_ms([row["measured_request_ms"] for row in rows])
    memory_unit, memory = units.common_bytes([row["memory_bytes"] for row in rows])
    predicted = [_in_unit(row["predicted_request_ms"], unit) for row in rows]
    ends = [
        units.interval(row["perplexity_increase_low"], row["perplexity_increase_high"])
        for row in rows
    ]
    labelled = any(row.get("accuracy") is not None for row in rows)
    columns = [
        (True, Column(f"Request\n[{unit}]", times)),
        (wide, Column(f"Predicted\n[{unit}]", predicted)),
        (True, Column("Speed", [f"{row['speedup']:.2f}x" for row in rows])),
        (wide, Column("As you\nrun it", [_as_run(row) for row in rows])),
        (wide, Column("Perplexity", [_optional(row["perplexity"], 5) for row in rows])),
        (True, Column(increase_heading(rows).replace(" ", "\n"), list(map(increase_words, rows)))),
        (True, Column("95%\ninterval", ends)),
        (wide, Column("KL", [_optional(row["kl"]) for row in rows])),
        (labelled, Column("Accu-\nracy", [_accuracy(row) for row in rows])),
        (True, Column(f"Memory\n[{memory_unit}]", memory)),
        *_kept_columns(rows),
    ]
    return [column for shown, column in columns if shown]


def _kept_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[bool, Column]]:
    """Return a column of the keys and values of a sequence, if plans keep them in several ways."""
    sizes = [row.get("kv_cache_bytes") for row in rows]
    known = [size for size in sizes if size is not None]
    if not any(row.get("kv_cache") for row in rows) or not known:
        return []
    unit, cells = units.common_bytes(known)
    shown = iter(cells)
    texts = [units.MISSING if size is None else next(shown) for size in sizes]
    return [(True, Column(f"Keys,\nvalues\n[{unit}]", texts))]


def _accuracy(row: Mapping[str, Any]) -> str:
    return "-" if row.get("accuracy") is None else f"{row['accuracy']:.1%}"


def layers_table(plan: Plan, width: int = 80) -> Table:
    """Return a table of a plan's layers. Similar layers with the same choice share a row."""
    wide = width >= WIDE
    table = plain_table()
    table.add_column("Layers" if wide else "Layers, and why", overflow="fold", ratio=3)
    table.add_column("Format, kernel by rows", overflow="fold", ratio=2)
    table.add_column("Predicted time", justify="right", no_wrap=True)
    table.add_column("Loss", justify="right", no_wrap=True)
    table.add_column("Memory", justify="right", no_wrap=True)
    if wide:
        table.add_column("Why", overflow="fold", ratio=3)
    for pattern, layers in layer_groups(plan.layers):
        name = Text(pattern)
        name.append(f"\n{layer_words(layers[0], len(layers))}", style="dim")
        why = reasons(layers)
        if why and not wide:
            name.append(f"\n{why}", style="italic")
        cells = [
            name,
            Text(f"{layers[0].format}\n{route_text(layers[0].route)}{joined_text(layers[0])}"),
            Text("\n".join(_phases(layers))),
            Text(units.digits(sum(layer.loss for layer in layers), 2)),
            Text(units.size(sum(layer.memory_bytes for layer in layers))),
        ]
        table.add_row(*cells, *([Text(why)] if wide else []), end_section=True)
    return table


def layer_groups(layers: Sequence[LayerChoice]) -> list[tuple[str, tuple[LayerChoice, ...]]]:
    """Return layers with one shape, format and route, folded by name, in the plan's order."""
    alike: dict[tuple[Any, ...], list[LayerChoice]] = {}
    for layer in layers:
        alike.setdefault((layer.shape, layer.format, layer.route, bool(layer.joined)), []).append(
            layer
        )
    groups = []
    for members in alike.values():
        by_name = {layer.name: layer for layer in members}
        groups += [
            (pattern, tuple(by_name[name] for name in names)) for pattern, names in fold(by_name)
        ]
    position = {layer.name: index for index, layer in enumerate(layers)}
    return sorted(groups, key=lambda group: position[group[1][0].name])


def joined_text(layer: LayerChoice) -> str:
    """Return the layers that are computed as one with a layer, or are one tensor with a table."""
    if layer.tied and not layer.memory_bytes:
        return f"\none tensor with\n{layer.tied}"
    others = [name.rpartition(".")[2] for name in layer.joined if name != layer.name]
    return f"\nas one with\n{', '.join(others)}" if others else ""


def route_text(route: Route) -> str:
    """Return a route in words, a line for each kernel: `m<=16 weight-only`, `above dynamic`."""
    if len(route) == 1:
        return route[0].kernel
    return "\n".join(
        f"m<={step.upper_m} {step.kernel}" if step.upper_m is not None else f"above {step.kernel}"
        for step in route
    )


def reasons(layers: Sequence[LayerChoice]) -> str:
    """Return the first reason for the layers' choice, and the number of other reasons."""
    distinct = list(dict.fromkeys(layer.reason for layer in layers if layer.reason))
    if len(distinct) <= 1:
        return "".join(distinct)
    return f"{layers[0].name}: {layers[0].reason} ({len(distinct) - 1} more reasons with --json)"


def coverage_table(recording: Recording) -> Table:
    """Return a table of what is not searched, and why."""
    table = plain_table()
    table.add_column("Not searched", overflow="fold", ratio=2)
    table.add_column("Weights", justify="right", no_wrap=True)
    table.add_column("Why", overflow="fold", ratio=3)
    lines = skipped_lines(recording.skipped)
    for pattern, share, reason in lines[:_SKIPPED_ROWS]:
        table.add_row(Text(pattern), units.percent(share), Text(reason))
    rest = lines[_SKIPPED_ROWS:]
    if rest:
        table.add_row(
            f"{len(rest)} more", units.percent(sum(line[1] for line in rest)), "listed with --json"
        )
    return table


def coverage_line(recording: Recording) -> str:
    """Return the coverage in one sentence."""
    flops = ", ".join(
        f"{units.percent(share)} in {phase}" for phase, share in recording.flops_share.items()
    )
    weights = units.percent(recording.weights_share)
    done = f" and do of the FLOPs {flops}" if flops else ""
    tables = ", ".join(table.name for table in recording.tables)
    more = f" Tables: {tables}." if tables else ""
    return f"{len(recording.sites)} linear layers hold {weights} of the weights{done}.{more}"


def uncovered_lines(recording: Recording | None) -> list[str]:
    """Say that most of a model is left as it is, and the largest parts of it; else no lines."""
    if recording is None or recording.weights_share >= _MOST:
        return []
    parts = [
        f"{pattern} ({units.percent(share)}, {reason})"
        for pattern, share, reason in skipped_lines(recording.skipped)[:_NAMED]
    ]
    return [
        f"Most of this model is left as it is: {coverage_line(recording)}",
        *([f"  Left alone: {'; '.join(parts)}"] if parts else []),
    ]


def candidates_table(candidates: Sequence[CandidateLine], width: int = 80) -> Table:
    """Return a table of candidates: what a device can use, and why it cannot use the rest."""
    wide = width >= WIDE
    table = plain_table()
    table.add_column("Format", no_wrap=True)
    table.add_column("Kernel", no_wrap=wide, overflow="fold")
    if wide:
        table.add_column("Numerics", no_wrap=True)
    table.add_column("Usable", no_wrap=True)
    table.add_column("What it is, or why not", overflow="fold", ratio=1)
    for candidate in candidates:
        text = candidate.description if candidate.usable else candidate.reason
        numerics = [Text(candidate.numerics)] if wide else []
        table.add_row(
            Text(candidate.format),
            Text(candidate.kernel),
            *numerics,
            ("yes" if candidate.by_default else "opt-in") if candidate.usable else "no",
            Text(text),
            style="" if candidate.usable else "dim",
        )
    return table


def ties_of_recommended(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows within the limits that differ from the recommended one only by noise."""
    recommended = next((row for row in rows if row["recommended"]), {})
    ids = recommended.get("ties", "").split()
    return [row for row in rows if row["plan_id"] in ids and row["within_limits"]]


def _mark(row: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> str:
    on_front = "*" if row["on_front"] else " "
    if row["recommended"]:
        return f">{on_front}"
    if row in rivals:
        return f"~{on_front}"
    if row.get("not_recommended"):
        return f"x{on_front}"
    return f" {on_front}" if row["within_limits"] else f"!{on_front}"


def _as_run(row: Mapping[str, Any]) -> str:
    speedup = row.get("as_run_speedup")
    return units.MISSING if speedup is None else f"{speedup:.2f}x"


def _optional(value: float | None, significant: int = 3) -> str:
    return units.MISSING if value is None else units.digits(value, significant)


def _in_unit(milliseconds: float, unit: str) -> str:
    return units.digits(milliseconds / {"s": 1e3, "ms": 1.0, "µs": 1e-3}[unit], 4)


def _phases(layers: Sequence[LayerChoice]) -> list[str]:
    totals: dict[str, float] = {}
    for layer in layers:
        for phase, latency_us in layer.latency_us.items():
            totals[phase] = totals.get(phase, 0.0) + latency_us
    return [f"{phase} {units.duration_us(total)}" for phase, total in totals.items()]


def skipped_lines(skipped: Sequence[Skipped]) -> list[tuple[str, float, str]]:
    """Return (names, share of the parameters, reason) of what is not searched, largest first."""
    by_reason: dict[str, dict[str, Skipped]] = {}
    for item in skipped:
        by_reason.setdefault(item.reason, {})[item.name] = item
    lines = [
        (pattern, sum(items[name].share for name in names), reason)
        for reason, items in by_reason.items()
        for pattern, names in fold(items)
    ]
    return sorted(lines, key=lambda line: -line[1])
