"""Perplexity at long context, by how keys and values are kept, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from rich.table import Table

from autoquant.records import Interval
from autoquant.report import units
from autoquant.report.tables.layout import WIDE, Column, number_table, plain_table


class ContextLine(Protocol):
    """What is read from `autoquant.tuner.contexts.ContextRow`."""

    @property
    def plan_id(self) -> str | None: ...

    @property
    def label(self) -> str: ...

    @property
    def kv_cache(self) -> str | None: ...

    @property
    def tokens(self) -> int: ...

    @property
    def windows(self) -> int: ...

    @property
    def perplexity(self) -> float: ...

    @property
    def increase(self) -> Interval | None: ...

    @property
    def kv_bytes(self) -> int | None: ...


def context_table(rows: Sequence[ContextLine], width: int = 80) -> Table:
    """Return a table with a row for each model and cache, the unquantized model first."""
    columns = [
        Column("Keys and\nvalues", [row.kv_cache or "off" for row in rows]),
        Column("Perplexity\n", [f"{row.perplexity:.4g}" for row in rows]),
        Column("Increase\n", [_increase(row) for row in rows]),
        Column("95%\ninterval", [_interval(row) for row in rows]),
    ]
    if all(row.kv_bytes is not None for row in rows):
        unit, cells = units.common_bytes([row.kv_bytes or 0 for row in rows])
        columns.append(Column(f"A sequence\n[{unit}]", cells))
    caption = f"{rows[0].windows} windows of {rows[0].tokens} tokens"
    table = plain_table(caption=caption, expand=width < WIDE)
    return number_table([row.label for row in rows], columns, table)


def context_objects(rows: Sequence[ContextLine]) -> list[dict[str, Any]]:
    """Return the rows as JSON objects."""
    return [
        {
            "plan_id": row.plan_id,
            "label": row.label,
            "kv_cache": row.kv_cache,
            "tokens": row.tokens,
            "windows": row.windows,
            "perplexity": row.perplexity,
            "increase": None if row.increase is None else asdict(row.increase),
            "kv_cache_bytes": row.kv_bytes,
        }
        for row in rows
    ]


def _increase(row: ContextLine) -> str:
    return units.MISSING if row.increase is None else f"{100 * row.increase.value:+.2f}%"


def _interval(row: ContextLine) -> str:
    if row.increase is None:
        return units.MISSING
    return f"{100 * row.increase.low:+.2f}..{100 * row.increase.high:+.2f}"
