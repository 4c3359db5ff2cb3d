"""The measurements of `autoquant bench` as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from rich.table import Table

from autoquant.records import Interval, Plan, RunTimes, Workload
from autoquant.report import units
from autoquant.report.attribution import Attributed, responsible, slowed_notes
from autoquant.report.tables.layout import WIDE, Column, number_table, plain_table
from autoquant.report.words import is_off, loop_words


class BenchLine(Attributed, Protocol):
    """What is read from `autoquant.tuner.bench.BenchRow`."""

    @property
    def plan_id(self) -> str | None: ...

    @property
    def predicted_request_ms(self) -> float | None: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def kv_bytes(self) -> int | None: ...

    @property
    def peak_bytes(self) -> int | None: ...

    @property
    def notes(self) -> tuple[str, ...]: ...


class LoopLine(Protocol):
    """What is read from `autoquant.tuner.bench.LoopRow`, and from that of an engine."""

    @property
    def plan_id(self) -> str | None: ...

    @property
    def label(self) -> str: ...

    @property
    def loop(self) -> str: ...

    @property
    def times(self) -> RunTimes: ...

    @property
    def ratio(self) -> Interval | None: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def notes(self) -> tuple[str, ...]: ...


def bench_table(rows: Sequence[BenchLine], workload: Workload, width: int = 80) -> Table:
    """Return a table with a row for each model. The first is the unquantized one."""
    columns = [
        _times(phase.name, [row.phase_ms[phase.name] for row in rows]) for phase in workload.phases
    ]
    columns += [
        _times("Request", [row.request_ms for row in rows]),
        Column("Speed\n", [f"{rows[0].request_ms / row.request_ms:.2f}x" for row in rows]),
        Column("Pre-\ndicted", [_error(row) for row in rows]),
    ]
    if any(phase.name == "decode" for phase in workload.phases):
        rates = [units.digits(_tokens_per_s(row, workload) or 0.0) for row in rows]
        columns.append(Column("Tokens\n/s", rates))
    columns.append(_bytes("Memory", [row.memory_bytes for row in rows]))
    sizes = [row.kv_bytes for row in rows if row.kv_bytes is not None]
    if len(sizes) == len(rows) and len(set(sizes)) > 1:  # of a sequence
        columns.append(_bytes("Keys,\nvalues", sizes))
    if all(row.peak_bytes is not None for row in rows):
        columns.append(_bytes("Peak", [row.peak_bytes or 0 for row in rows]))
    table = plain_table(expand=width < WIDE)
    return number_table([row.label for row in rows], columns, table)


def loop_table(rows: Sequence[LoopLine], workload: Workload, width: int = 80) -> Table:
    """Return a table with a row for each model, timed as a user runs it, unquantized first."""
    columns = [_times(head, times) for head, times in _loop_times(rows)]
    columns += [
        Column("Speed\n", [_loop_speed(row) for row in rows]),
        Column("95%\ninterval", [_loop_interval(row) for row in rows]),
        _bytes("Memory", [row.memory_bytes for row in rows]),
    ]
    caption = f"Timed in turn: {loop_words(rows[0].loop, workload)}"
    table = plain_table(caption=caption, expand=width < WIDE)
    return number_table([row.label for row in rows], columns, table)


def _times(head: str, milliseconds: Sequence[float]) -> Column:
    unit, cells = units.common_ms(milliseconds)
    return Column(f"{head}\n[{unit}]", cells)


def _bytes(head: str, values: Sequence[float]) -> Column:
    unit, cells = units.common_bytes(values)
    return Column(f"{head}\n[{unit}]", cells)


def loop_objects(rows: Sequence[LoopLine], workload: Workload) -> list[dict[str, Any]]:
    """Return the rows as JSON objects.

    `request_ratio` is over the unquantized model, with its 95 % interval.
    """
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
    """Return the columns of times by head. A model that makes no tokens has only requests."""
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
    if row.ratio is None or row.ratio.low <= 0:
        return units.MISSING
    return f"{1 / row.ratio.high:.2f}..{1 / row.ratio.low:.2f}"


def bench_notes(
    rows: Sequence[BenchLine], plans: Mapping[str, Plan], workload: Workload
) -> list[str]:
    """Return notes on the rows, and which layers make a request miss its prediction."""
    notes = [f"note: {row.label}: {note}" for row in rows for note in row.notes]
    notes += [f"note: {row.label}: {note}" for row in rows for note in slowed_notes(row)]
    for row in rows:
        if row.plan_id is None or plans[row.plan_id].kv_cache is not None:
            continue  # what a cache changes is not predicted
        if is_off(_relative_error(row) or 0.0):
            notes.append(f"note: {row.label}: {_off_words(row, plans[row.plan_id], workload)}")
    return notes


def _off_words(row: BenchLine, plan: Plan, workload: Workload) -> str:
    predicted = units.duration_ms(row.predicted_request_ms or 0.0)
    why = "--attribute names the layers responsible"
    if row.steps:
        why = responsible(row, plan, workload)
    return (
        f"{units.duration_ms(row.request_ms)} a request instead of the predicted {predicted}: {why}"
    )


def bench_objects(rows: Sequence[BenchLine], workload: Workload) -> list[dict[str, Any]]:
    """Return the rows as JSON objects."""
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
            "kv_cache_bytes": row.kv_bytes,
            "peak_bytes": row.peak_bytes,
            "notes": list(row.notes),
        }
        for row in rows
    ]


def _tokens_per_s(row: BenchLine, workload: Workload) -> float | None:
    """Return decoded tokens per second over all sequences of the batch, or None."""
    step_ms = row.phase_ms.get("decode")
    return workload.batch * 1e3 / step_ms if step_ms else None


def _relative_error(row: BenchLine) -> float | None:
    """Return the error of the prediction as a fraction of the measured time, or None."""
    if row.predicted_request_ms is None:
        return None
    return row.predicted_request_ms / row.request_ms - 1


def _error(row: BenchLine) -> str:
    error = _relative_error(row)
    return units.MISSING if error is None else f"{error:+.1%}"
