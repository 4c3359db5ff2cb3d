"""What `autoquant bench` measured, as table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from rich.table import Table
from rich.text import Text

from autoquant.records import Interval, Loop, Plan, RunTimes, Workload
from autoquant.report import units
from autoquant.report.attribution import Attributed, responsible, slowed_notes
from autoquant.report.tables.plans import WIDE, plain_table
from autoquant.report.words import is_off, loop_words


class BenchLine(Attributed, Protocol):
    """What is read of `autoquant.tuner.bench.BenchRow`."""

    @property
    def plan_id(self) -> str | None: ...

    @property
    def predicted_request_ms(self) -> float | None: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def peak_bytes(self) -> int | None: ...

    @property
    def notes(self) -> tuple[str, ...]: ...


class LoopLine(Protocol):
    """What is read of `autoquant.tuner.bench.LoopRow`."""

    @property
    def plan_id(self) -> str | None: ...

    @property
    def label(self) -> str: ...

    @property
    def loop(self) -> Loop: ...

    @property
    def times(self) -> RunTimes: ...

    @property
    def ratio(self) -> Interval | None: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def notes(self) -> tuple[str, ...]: ...


def bench_table(rows: Sequence[BenchLine], workload: Workload, width: int = 80) -> Table:
    """One line a model; the first is the unquantized one."""
    table = plain_table(expand=width < WIDE)
    table.add_column("Label", overflow="fold", ratio=1)
    columns = []
    for phase in workload.phases:
        unit, cells = units.common_ms([row.phase_ms[phase.name] for row in rows])
        columns.append((f"{phase.name}\n[{unit}]", cells))
    unit, cells = units.common_ms([row.request_ms for row in rows])
    columns.append((f"Request\n[{unit}]", cells))
    columns.append(("Speed\n", [f"{rows[0].request_ms / row.request_ms:.2f}x" for row in rows]))
    columns.append(("Pre-\ndicted", [_error(row) for row in rows]))
    if any(phase.name == "decode" for phase in workload.phases):
        columns.append(
            ("Tokens\n/s", [units.digits(_tokens_per_s(row, workload) or 0.0) for row in rows])
        )
    unit, cells = units.common_bytes([row.memory_bytes for row in rows])
    columns.append((f"Memory\n[{unit}]", cells))
    if all(row.peak_bytes is not None for row in rows):
        unit, cells = units.common_bytes([row.peak_bytes or 0 for row in rows])
        columns.append((f"Peak\n[{unit}]", cells))
    for head, _ in columns:
        table.add_column(Text(head), justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*map(Text, [row.label, *(cells[number] for _, cells in columns)]))
    return table


def loop_table(rows: Sequence[LoopLine], workload: Workload, width: int = 80) -> Table:
    """One line a model, timed as a user runs it; the first is the unquantized one."""
    table = plain_table(
        caption=f"Timed in turn: {loop_words(rows[0].loop, workload)}", expand=width < WIDE
    )
    table.add_column("Label", overflow="fold", ratio=1)
    columns = []
    for head, times in _loop_times(rows):
        unit, cells = units.common_ms(times)
        columns.append((f"{head}\n[{unit}]", cells))
    columns.append(("Speed\n", [_loop_speed(row) for row in rows]))
    columns.append(("95%\ninterval", [_loop_interval(row) for row in rows]))
    unit, cells = units.common_bytes([row.memory_bytes for row in rows])
    columns.append((f"Memory\n[{unit}]", cells))
    for head, _ in columns:
        table.add_column(Text(head), justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*map(Text, [row.label, *(cells[number] for _, cells in columns)]))
    return table


def loop_objects(rows: Sequence[LoopLine], workload: Workload) -> list[dict[str, Any]]:
    """The rows with what follows from them; `request_ratio` is over the unquantized model, with its 95 % interval."""
    return [
        {
            "plan_id": row.plan_id,
            "label": row.label,
            "loop": row.loop,
            "request_ms": row.times.request_ms,
            "first_token_ms": row.times.first_token_ms,
            "step_ms": row.times.step_ms,
            "tokens_per_s": workload.batch * 1e3 / row.times.step_ms if row.times.step_ms else None,
            "speedup": 1.0 if row.ratio is None else 1 / row.ratio.value,
            "request_ratio": None if row.ratio is None else asdict(row.ratio),
            "memory_bytes": row.memory_bytes,
            "notes": list(row.notes),
        }
        for row in rows
    ]


def _loop_times(rows: Sequence[LoopLine]) -> list[tuple[str, list[float]]]:
    """The columns of times, each with its head; those of tokens where tokens are what is made."""
    columns: list[tuple[str, list[float | None]]] = [
        ("First\ntoken", [row.times.first_token_ms for row in rows]),
        ("Each\nfurther", [row.times.step_ms for row in rows]),
        ("Request", [row.times.request_ms for row in rows]),
    ]
    known = [(head, [time for time in times if time is not None]) for head, times in columns]
    return [(head, times) for head, times in known if times]


def _loop_speed(row: LoopLine) -> str:
    return f"{1 / row.ratio.value:.2f}x" if row.ratio else "1.00x"


def _loop_interval(row: LoopLine) -> str:
    return (
        f"{1 / row.ratio.high:.2f}..{1 / row.ratio.low:.2f}"
        if row.ratio and row.ratio.low > 0
        else units.MISSING
    )


def bench_notes(
    rows: Sequence[BenchLine], plans: Mapping[str, Plan], workload: Workload
) -> list[str]:
    """What else there is to say, a line each: above all, what makes a request take another time than predicted."""
    notes = [f"note: {row.label}: {note}" for row in rows for note in row.notes]
    notes += [f"note: {row.label}: {note}" for row in rows for note in slowed_notes(row)]
    for row in rows:
        if (
            row.plan_id is None
            or row.predicted_request_ms is None
            or not is_off(_relative_error(row) or 0.0)
        ):
            continue
        instead = f"instead of the predicted {units.duration_ms(row.predicted_request_ms)}"
        why = (
            responsible(row, plans[row.plan_id], workload)
            if row.steps
            else "--attribute names the layers responsible"
        )
        notes.append(
            f"note: {row.label}: {units.duration_ms(row.request_ms)} a request {instead}: {why}"
        )
    return notes


def bench_objects(rows: Sequence[BenchLine], workload: Workload) -> list[dict[str, Any]]:
    """The rows with what follows from them."""
    return [
        {
            "plan_id": row.plan_id,
            "label": row.label,
            "phase_ms": dict(row.phase_ms),
            "time_to_first_token_ms": row.phase_ms.get("prefill"),
            "time_per_token_ms": row.phase_ms.get("decode"),
            "tokens_per_s": _tokens_per_s(row, workload),
            "request_ms": row.request_ms,
            "speedup": rows[0].request_ms / row.request_ms,
            "predicted_request_ms": row.predicted_request_ms,
            "memory_bytes": row.memory_bytes,
            "peak_bytes": row.peak_bytes,
            "notes": list(row.notes),
        }
        for row in rows
    ]


def _tokens_per_s(row: BenchLine, workload: Workload) -> float | None:
    """Tokens that decoding gives a second, all sequences of the batch together."""
    step_ms = row.phase_ms.get("decode")
    return workload.batch * 1e3 / step_ms if step_ms else None


def _relative_error(row: BenchLine) -> float | None:
    """By how much the prediction was off, as a fraction of what was measured."""
    return (
        None if row.predicted_request_ms is None else row.predicted_request_ms / row.request_ms - 1
    )


def _error(row: BenchLine) -> str:
    error = _relative_error(row)
    return units.MISSING if error is None else f"{error:+.1%}"
