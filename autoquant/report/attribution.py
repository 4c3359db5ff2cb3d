"""Where the time of a step goes, as tables and as JSON. The tables fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoquant.records import Plan, Workload, request_time
from autoquant.report import units
from autoquant.report.names import fold
from autoquant.report.tables.layout import WIDE, plain_table
from autoquant.runtime.steps import LINEAR, StepProfile

_GAPS = "gaps: nothing runs"
_ALL_ELSE = "all else"
_LAYERS = 5
_KERNELS = 10
_DIFFERENCES = 6
_NAMED = 3
_SLOWED = 1.5


class Attributed(Protocol):
    """What is read from `autoquant.tuner.bench.BenchRow`. `steps` are by phase."""

    @property
    def label(self) -> str: ...

    @property
    def phase_ms(self) -> Mapping[str, float]: ...

    @property
    def request_ms(self) -> float: ...

    @property
    def predicted_request_ms(self) -> float | None: ...

    @property
    def steps(self) -> Mapping[str, StepProfile]: ...


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step: linears with similar names, a kind of glue, or the gaps.

    Attributes:
        original_us: Time of the same part in the unquantized model.
        alone_us: Time of the same linears by their own timings, or None for what no plan covers.
    """

    what: str
    time_us: float
    original_us: float
    alone_us: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Time of linears, or of all else, in a request, with its prediction."""

    what: str
    time_ms: float
    predicted_ms: float

    @property
    def excess_ms(self) -> float:
        return self.time_ms - self.predicted_ms


def step_parts(step: StepProfile, original: StepProfile, plan: Plan | None) -> list[Part]:
    """Return all parts of a step: linears (slowest first), then glue, then gaps."""
    alone = _alone_us(plan, step.phase)
    ours, theirs = step.layer_us(alone), original.layer_us(alone)
    linears = []
    for pattern, names in fold(ours):
        time_us = sum(ours[name] for name in names)
        original_us = sum(theirs.get(name, 0.0) for name in names)
        all_timed = all(name in alone for name in names)
        alone_us = sum(alone[name] for name in names) if all_timed else None
        linears.append(Part(pattern, time_us, original_us, alone_us))
    glue, before = step.glue_us(), original.glue_us()
    return [
        *sorted(linears, key=lambda part: -part.time_us),
        *(Part(kind, time_us, before.get(kind, 0.0), None) for kind, time_us in glue.items()),
        Part(_GAPS, step.gaps_us(), original.gaps_us(), None),
    ]


def differences(row: Attributed, plan: Plan, workload: Workload) -> list[Difference]:
    """Return what makes a request longer or shorter than predicted, largest difference first.

    The times of linears come from the profiler. All else is the rest of the request as timed
    without the profiler, and the rest of its prediction. So both columns add up to the request.
    """
    calls = workload.calls()
    predicted = {layer.name: request_time(layer.latency_us, calls) / 1e3 for layer in plan.layers}
    by_phase = {phase: step.layer_us(_alone_us(plan, phase)) for phase, step in row.steps.items()}
    measured = {}
    for name in predicted:
        step_us = {phase: times.get(name, 0.0) for phase, times in by_phase.items()}
        measured[name] = request_time(step_us, calls) / 1e3
    found = []
    for pattern, names in fold(predicted):
        time_ms = sum(measured[name] for name in names)
        predicted_ms = sum(predicted[name] for name in names)
        found.append(Difference(pattern, time_ms, predicted_ms))
    rest_ms = _predicted_ms(row) - sum(predicted.values())
    found.append(Difference(_ALL_ELSE, row.request_ms - sum(measured.values()), rest_ms))
    return sorted(found, key=lambda difference: -abs(difference.excess_ms))


def responsible(row: Attributed, plan: Plan, workload: Workload) -> str:
    """Return the layers that cause most of the prediction's error, in words."""
    sign = 1 if row.request_ms > _predicted_ms(row) else -1
    found = differences(row, plan, workload)
    to_blame = [each for each in found if each.excess_ms * sign > 0]
    return ", ".join(f"{each.what} {_signed_ms(each.excess_ms)}" for each in to_blame[:_NAMED])


def _predicted_ms(row: Attributed) -> float:
    assert row.predicted_request_ms is not None  # only the unquantized model has none
    return row.predicted_request_ms


def slowed_notes(row: Attributed) -> list[str]:
    """Return notes on phases that the profiler slowed down so much that shares mean little."""
    notes = []
    for phase, step in row.steps.items():
        ratio = step.step_us / 1e3 / row.phase_ms[phase]
        if ratio > _SLOWED:
            notes.append(
                f"a {phase} step took {ratio:.1f} times longer with the profiler, which widens"
                " gaps; close other programs for shares to trust"
            )
    return notes


def attribution_report(
    row: Attributed, original: Attributed, plan: Plan | None, workload: Workload, width: int
) -> Group:
    """Return tables of each phase's step and, for a plan, the request against its prediction."""
    parts: list[RenderableType] = []
    for phase, step in row.steps.items():
        timed = units.duration_ms(row.phase_ms[phase])
        profiled = units.duration_us(step.step_us)
        head = f"{row.label}, {phase}: {profiled} a step with the profiler, {timed} without"
        parts += [
            Text(head, style="bold"),
            _parts_table(step_parts(step, original.steps[phase], plan), step),
            Text(""),
            _gaps_text(step),
            Text(""),
            _layers_table(step, plan),
            Text(""),
            _kernels_table(step, width),
            Text(""),
        ]
    if plan is None:
        return Group(*parts)
    found = differences(row, plan, workload)
    parts += [
        Text(f"{row.label}: a request against its prediction", style="bold"),
        _differences_table(found),
    ]
    return Group(*parts)


def attribution_object(
    row: Attributed, original: Attributed, plan: Plan, workload: Workload
) -> dict[str, Any]:
    """Return the attribution in full, for JSON."""
    steps = {
        phase: {
            "step_us": step.step_us,
            "parts": [asdict(part) for part in step_parts(step, original.steps[phase], plan)],
            "layers_us": step.layer_us(_alone_us(plan, phase)),
            "kernels": [asdict(kernel) for kernel in step.kernels],
        }
        for phase, step in row.steps.items()
    }
    found = differences(row, plan, workload)
    return {
        "steps": steps,
        "differences": [{**asdict(each), "excess_ms": each.excess_ms} for each in found],
    }


def trace_object(rows: Mapping[str, Mapping[str, StepProfile]]) -> dict[str, Any]:
    """Return a trace for chrome://tracing and Perfetto: layers above kernels, by model and phase.

    Args:
        rows: The steps by phase, by the name of the model.
    """
    events: list[dict[str, Any]] = []
    steps = [
        (f"{label}, {phase}", step)
        for label, by_phase in rows.items()
        for phase, step in by_phase.items()
    ]
    for process, (name, step) in enumerate(steps):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        for thread, track in enumerate(("layers", "kernels")):
            named = {"pid": process, "tid": thread, "args": {"name": track}}
            events.append({"ph": "M", "name": "thread_name", **named})
        for what, start_us, duration_us in _owners(step):
            place = {"pid": process, "tid": 0, "ts": start_us, "dur": duration_us}
            events.append({"ph": "X", "name": what, **place})
        for kernel in step.kernels:
            place = {"pid": process, "tid": 1, "ts": kernel.start_us, "dur": kernel.duration_us}
            args = {"kind": kernel.kind, "layer": as_one(kernel.layers)}
            events.append({"ph": "X", "name": kernel.name, **place, "args": args})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def as_one(names: tuple[str, ...]) -> str:
    """Return the layers of one kernel in words: `model.layers.0.self_attn.q_proj + k_proj`."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(names) < 2 or len(parents) > 1:
        return " + ".join(names)
    return " + ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def _owners(step: StepProfile) -> Iterator[tuple[str, float, float]]:
    """Yield (layer or kind, start, duration) of successive kernels with one owner."""
    what, start_us, end_us = "", 0.0, 0.0
    for kernel in step.kernels:
        owner = as_one(kernel.layers) or kernel.kind
        if owner != what:
            if what:
                yield what, start_us, end_us - start_us
            what, start_us = owner, kernel.start_us
        end_us = kernel.start_us + kernel.duration_us
    if what:
        yield what, start_us, end_us - start_us


def _alone_us(plan: Plan | None, phase: str) -> dict[str, float]:
    """Return the microseconds of one run of the phase by each layer's own timing."""
    layers = plan.layers if plan else ()
    return {layer.name: layer.latency_us[phase] for layer in layers if layer.latency_us.get(phase)}


def _parts_table(parts: list[Part], step: StepProfile) -> Table:
    table = plain_table()
    table.add_column("Where the time goes", overflow="fold", ratio=1)
    for head in ("Time", "Share", "Unquan-\ntized", "By own\ntiming"):
        table.add_column(head, justify="right", no_wrap=True)
    for part in parts:
        alone = units.MISSING if part.alone_us is None else units.duration_us(part.alone_us)
        share = f"{part.time_us / step.step_us:.1%}"
        cells = (units.duration_us(part.time_us), share, units.duration_us(part.original_us), alone)
        table.add_row(Text(part.what), *cells)
    total = units.duration_us(sum(part.time_us for part in parts))
    before = units.duration_us(sum(part.original_us for part in parts))
    table.add_row("step", total, "100%", before, "", style="bold")
    return table


def _gaps_text(step: StepProfile) -> Text:
    gaps = [duration_us for _, duration_us in step.gaps()]
    longest = units.duration_us(max(gaps, default=0.0))
    return Text(
        f"{len(step.kernels)} kernels, {len(gaps)} gaps between them, the longest {longest}"
    )


def _layers_table(step: StepProfile, plan: Plan | None) -> Table:
    """Return a table of the slowest single layers."""
    alone = _alone_us(plan, step.phase)
    formats = {layer.name: layer.format for layer in plan.layers} if plan else {}
    table = plain_table()
    table.add_column("Slowest layers", overflow="fold", ratio=1)
    table.add_column("Format", no_wrap=True)
    table.add_column("Time", justify="right", no_wrap=True)
    table.add_column("By own\ntiming", justify="right", no_wrap=True)
    times = sorted(step.layer_us(alone).items(), key=lambda item: -item[1])
    for name, time_us in times[:_LAYERS]:
        own = units.duration_us(alone[name]) if name in alone else units.MISSING
        table.add_row(
            Text(name), Text(formats.get(name, units.MISSING)), units.duration_us(time_us), own
        )
    return table


def _kernels_table(step: StepProfile, width: int) -> Table:
    """Return a table of the slowest kernels, with the runs of each summed."""
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for kernel in step.kernels:
        # A C++ kernel's name ends with the types of its arguments.
        name = kernel.name.removeprefix("void ").split("(")[0]
        runs, time_us = sums.get((name, kernel.kind), (0, 0.0))
        sums[name, kernel.kind] = (runs + 1, time_us + kernel.duration_us)
    table = plain_table()
    table.add_column(
        "Slowest kernels",
        overflow="fold" if width >= WIDE else "ellipsis",
        no_wrap=width < WIDE,
        ratio=1,
    )
    table.add_column("What", no_wrap=True)
    table.add_column("Runs", justify="right", no_wrap=True)
    table.add_column("Time", justify="right", no_wrap=True)
    for (name, kind), (runs, time_us) in sorted(sums.items(), key=lambda item: -item[1][1])[
        :_KERNELS
    ]:
        what = "linear" if kind == LINEAR else kind
        table.add_row(Text(name), what, str(runs), units.duration_us(time_us))
    return table


def _differences_table(found: list[Difference]) -> Table:
    table = plain_table()
    table.add_column("Largest differences", overflow="fold", ratio=1)
    for head in ("In the\nmodel", "Pre-\ndicted", "Difference"):
        table.add_column(head, justify="right", no_wrap=True)
    for each in found[:_DIFFERENCES]:
        times = (units.duration_ms(each.time_ms), units.duration_ms(each.predicted_ms))
        table.add_row(Text(each.what), *times, _signed_ms(each.excess_ms))
    total = (sum(each.time_ms for each in found), sum(each.predicted_ms for each in found))
    row = (*map(units.duration_ms, total), _signed_ms(total[0] - total[1]))
    table.add_row("request", *row, style="bold")
    return table


def _signed_ms(milliseconds: float) -> str:
    return f"{'+' if milliseconds > 0 else ''}{units.duration_ms(milliseconds)}"
