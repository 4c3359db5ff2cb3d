"""What `autoquant bench` measured, as table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.table import Table
from rich.text import Text

from autoquant.records import Workload
from autoquant.report import units
from autoquant.report.tables import WIDE, plain_table

LARGEST_ERROR = 0.1
"""Above this difference between predicted and measured request time the report says so."""


class BenchLine(Protocol):
    """What is read of `autoquant.tuner.bench.BenchRow`."""

    @property
    def plan_id(self) -> str | None: ...

    @property
    def label(self) -> str: ...

    @property
    def phase_ms(self) -> Mapping[str, float]: ...

    @property
    def request_ms(self) -> float: ...

    @property
    def predicted_request_ms(self) -> float | None: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def peak_bytes(self) -> int | None: ...

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
        columns.append(("Tokens\n/s", [units.digits(_tokens_per_s(row, workload) or 0.0) for row in rows]))
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


def bench_notes(rows: Sequence[BenchLine]) -> list[str]:
    """What else there is to say, a line each."""
    notes = [f"note: {row.label}: {note}" for row in rows for note in row.notes]
    notes += [
        f"note: {row.label}: {units.duration_ms(row.request_ms)} a request instead of the predicted "
        f"{units.duration_ms(row.predicted_request_ms)}"
        for row in rows
        if row.predicted_request_ms is not None and abs(_relative_error(row) or 0.0) > LARGEST_ERROR
    ]
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
    return None if row.predicted_request_ms is None else row.predicted_request_ms / row.request_ms - 1


def _error(row: BenchLine) -> str:
    error = _relative_error(row)
    return units.MISSING if error is None else f"{error:+.1%}"
