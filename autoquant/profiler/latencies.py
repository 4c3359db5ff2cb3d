"""The timings of shapes: one row for each shape, m and candidate. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoquant.records import Device, LinearShape, Measurement, Roofline

COLUMNS = (
    "n",
    "k",
    "bias",
    "dtype",
    "m",
    "format",
    "kernel",
    "numerics",
    "outcome",
    "latency_us",
    "spread_us",
    "relative_error",
    "floor_us",
    "reason",
)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Timings of linears without a search.

    Attributes:
        rows: With the fields of `COLUMNS`, by shape, m and candidate in the order of the registry.
            `latency_us`, `spread_us` (interquartile range), `relative_error` and `floor_us` may be
            None.
        names: Names of each shape: layers of the model, or names in the file of shapes.
        source: Model or file that the shapes come from, for titles.
        from_store: How many of the rows came from the store.
        elapsed_s: Wall time of preparing and timing the others.
    """

    rows: tuple[Row, ...]
    names: Mapping[LinearShape, tuple[str, ...]]
    source: str
    device: Device
    roofline: Roofline
    from_store: int
    elapsed_s: float

    def shapes(self) -> dict[LinearShape, tuple[Row, ...]]:
        """Return the rows of each shape."""
        found: dict[LinearShape, list[Row]] = {}
        for row in self.rows:
            found.setdefault(shape_of(row), []).append(row)
        return {shape: tuple(rows) for shape, rows in found.items()}


def row_of(
    measurement: Measurement, numerics: str | None = None, floor_us: float | None = None
) -> Row:
    """Return a measurement with the fields of `COLUMNS`."""
    subject, timed = measurement.subject, bool(measurement.samples_us)
    return {
        "n": subject.shape.n,
        "k": subject.shape.k,
        "bias": subject.shape.bias,
        "dtype": subject.shape.dtype,
        "m": subject.m,
        "format": subject.format,
        "kernel": subject.kernel,
        "numerics": numerics,
        "outcome": measurement.outcome,
        "latency_us": measurement.latency_us if timed else None,
        "spread_us": measurement.spread_us if timed else None,
        "relative_error": measurement.relative_error,
        "floor_us": floor_us,
        "reason": measurement.reason,
    }


def shape_of(row: Row) -> LinearShape:
    """Return the shape of a row."""
    return LinearShape(n=row["n"], k=row["k"], bias=row["bias"], dtype=row["dtype"])


def is_original(row: Row) -> bool:
    """Check whether the row is about the unquantized weight."""
    return bool(row["format"] == f"{row['dtype']}/plain")
