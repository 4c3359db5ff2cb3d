"""Tables for the terminal: the front, a plan's layers, candidates, coverage. All fit 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich import box
from rich.table import Table
from rich.text import Text

from autoquant.records import LayerChoice, Plan, Recording, Route, Skipped
from autoquant.report import units
from autoquant.report.names import fold
from autoquant.report.words import increase_heading, increase_words

WIDE = 120
_LEGEND = "> recommended   * on the front: no other is faster, better and smaller at once"
_TIES_LEGEND = "> recommended   ~ a tie with it   * on the front: none is better in everything"
_BEYOND_LEGEND = "! beyond the limits, which the interval on the selection part has to keep to"
_REFUSED_LEGEND = "x not recommended for how it runs for its user, see below"
_SKIPPED_ROWS = 12


class CandidateLine(Protocol):
    """What the candidates table reads of a candidate's status."""

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
    """The shortest beginnings of one length that tell the plans apart."""
    longest = max((len(plan_id) for plan_id in plan_ids), default=0)
    for length in range(at_least, longest + 1):
        if len({plan_id[:length] for plan_id in plan_ids}) == len(set(plan_ids)):
            return {plan_id: plan_id[:length] for plan_id in plan_ids}
    return {plan_id: plan_id for plan_id in plan_ids}


def front_table(rows: Sequence[Mapping[str, Any]], width: int = 80) -> Table:
    """Proven plans, fastest first; `rows` are those of `Study.rows`."""
    wide = width >= WIDE
    unit, times = units.common_ms([row["measured_request_ms"] for row in rows])
    memory_unit, memory = units.common_bytes([row["memory_bytes"] for row in rows])
    rivals = ties_of_recommended(rows)
    legend = [_TIES_LEGEND if rivals else _LEGEND]
    legend += [] if all(row["within_limits"] for row in rows) else [_BEYOND_LEGEND]
    legend += [_REFUSED_LEGEND] if any(row.get("not_recommended") for row in rows) else []
    table = plain_table(caption="\n".join(legend))
    table.add_column("", no_wrap=True, width=2)
    table.add_column("Plan", no_wrap=True)
    table.add_column("Label", overflow="fold", ratio=1)
    table.add_column(Text(f"Request\n[{unit}]"), justify="right", no_wrap=True)
    if wide:
        table.add_column(Text(f"Predicted\n[{unit}]"), justify="right", no_wrap=True)
    table.add_column("Speed", justify="right", no_wrap=True)
    if wide:
        table.add_column("As you\nrun it", justify="right", no_wrap=True)
        table.add_column("Perplexity", justify="right", no_wrap=True)
    table.add_column(increase_heading(rows).replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column("95%\ninterval", justify="right", no_wrap=True)
    if wide:
        table.add_column("KL", justify="right", no_wrap=True)
    table.add_column(Text(f"Memory\n[{memory_unit}]"), justify="right", no_wrap=True)
    ids = short_ids([row["plan_id"] for row in rows])
    for row, time, stored in zip(rows, times, memory, strict=True):
        cells = [_mark(row, rivals), ids[row["plan_id"]], row["label"], time]
        cells += [_in_unit(row["predicted_request_ms"], unit)] if wide else []
        cells += [f"{row['speedup']:.2f}x"]
        cells += [_as_run(row)] if wide else []
        cells += [_optional(row["perplexity"], 5)] if wide else []
        cells += [increase_words(row)]
        cells += [units.interval(row["perplexity_increase_low"], row["perplexity_increase_high"])]
        cells += [_optional(row["kl"])] if wide else []
        cells += [stored]
        table.add_row(
            *map(Text, cells),
            style="bold" if row["recommended"] else "" if row["on_front"] else "dim",
        )
    return table


def layers_table(plan: Plan, width: int = 80) -> Table:
    """A plan layer by layer. Layers that differ in a number of their name only and got the same share a line."""
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
        name.append(f"\n{_many(len(layers))}{_shape(layers[0])}", style="dim")
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
    """Layers of one shape with one format and route, folded by name, in the order of the plan."""
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
    """What a layer is computed as one with."""
    others = [name.rpartition(".")[2] for name in layer.joined if name != layer.name]
    return f"\nas one with\n{', '.join(others)}" if others else ""


def route_text(route: Route) -> str:
    """A route in words, a line for each kernel: `m<=16 weight-only`, `above dynamic`."""
    if len(route) == 1:
        return route[0].kernel
    return "\n".join(
        f"m<={step.upper_m} {step.kernel}" if step.upper_m is not None else f"above {step.kernel}"
        for step in route
    )


def reasons(layers: Sequence[LayerChoice]) -> str:
    """Why these layers got what they got: the first reason, and how many others there are."""
    distinct = list(dict.fromkeys(layer.reason for layer in layers if layer.reason))
    if len(distinct) <= 1:
        return "".join(distinct)
    return f"{layers[0].name}: {layers[0].reason} ({len(distinct) - 1} more reasons with --json)"


def coverage_table(recording: Recording) -> Table:
    """What share of the model is searched, and what is left as it is."""
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
    """Coverage in one sentence."""
    flops = ", ".join(
        f"{units.percent(share)} in {phase}" for phase, share in recording.flops_share.items()
    )
    return (
        f"{len(recording.sites)} linear layers hold {units.percent(recording.weights_share)} of the weights"
        f"{f' and do of the FLOPs {flops}' if flops else ''}."
    )


def candidates_table(candidates: Sequence[CandidateLine], width: int = 80) -> Table:
    """What could be used on a device, and why the rest cannot."""
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


def plain_table(caption: str | None = None, *, expand: bool = True) -> Table:
    """An empty table in the look of all of them; `expand` fills the terminal's width."""
    return Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        caption=caption,
        caption_justify="left",
        expand=expand,
    )


def ties_of_recommended(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows within the limits that noise alone tells apart from the recommended one."""
    ids: list[str] = next((row.get("ties", "").split() for row in rows if row["recommended"]), [])
    return [row for row in rows if row["plan_id"] in ids and row["within_limits"]]


def _mark(row: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> str:
    within = "x" if row.get("not_recommended") else " " if row["within_limits"] else "!"
    first = ">" if row["recommended"] else "~" if row in rivals else within
    return f"{first}{'*' if row['on_front'] else ' '}"


def _as_run(row: Mapping[str, Any]) -> str:
    speedup = row.get("as_run_speedup")
    return units.MISSING if speedup is None else f"{speedup:.2f}x"


def _optional(value: float | None, significant: int = 3) -> str:
    return units.MISSING if value is None else units.digits(value, significant)


def _in_unit(milliseconds: float, unit: str) -> str:
    return units.digits(milliseconds / {"s": 1e3, "ms": 1.0, "µs": 1e-3}[unit], 4)


def _many(count: int) -> str:
    return "" if count == 1 else f"{count} layers of "


def _shape(layer: LayerChoice) -> str:
    shape = layer.shape
    return f"{shape.n} x {shape.k}{' + bias' if shape.bias else ''}, {shape.dtype}"


def _phases(layers: Sequence[LayerChoice]) -> list[str]:
    totals: dict[str, float] = {}
    for layer in layers:
        for phase, latency_us in layer.latency_us.items():
            totals[phase] = totals.get(phase, 0.0) + latency_us
    return [f"{phase} {units.duration_us(total)}" for phase, total in totals.items()]


def skipped_lines(skipped: Sequence[Skipped]) -> list[tuple[str, float, str]]:
    """What is not searched as (names, share of the parameters, reason), the largest share first."""
    by_reason: dict[str, dict[str, Skipped]] = {}
    for item in skipped:
        by_reason.setdefault(item.reason, {})[item.name] = item
    lines = [
        (pattern, sum(items[name].share for name in names), reason)
        for reason, items in by_reason.items()
        for pattern, names in fold(items)
    ]
    return sorted(lines, key=lambda line: -line[1])
