"""What every drawing of a front has in common: which rows are drawn, the line of the front, and where a scale is not linear."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDE_TIMES, _WIDE_INCREASES = 8.0, 12.0  # ratios above which an axis is logarithmic

Row = Mapping[str, Any]
"""One of `Study.rows`."""


def drawable(row: Row) -> bool:
    """Whether a row has finite numbers on both axes."""
    return all(math.isfinite(row[name]) for name in ("measured_request_ms", "perplexity_increase"))


def left_out_note(rows: Sequence[Row]) -> str:
    """What is said of the rows that cannot be drawn; empty where there are none."""
    left_out = sum(not drawable(row) for row in rows)
    return f"not shown: {left_out} plans without finite quality" if left_out else ""


def staircase(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in time and quality, fastest first (memory left aside: the picture has two axes)."""
    steps: list[Row] = []
    for row in sorted(
        rows, key=lambda row: (row["measured_request_ms"], row["perplexity_increase"])
    ):
        if not steps or row["perplexity_increase"] < steps[-1]["perplexity_increase"]:
            steps.append(row)
    return steps


def wide_times(rows: Sequence[Row]) -> bool:
    """Whether the axis of times is logarithmic."""
    times = [row["measured_request_ms"] for row in rows]
    return bool(times) and max(times) > _WIDE_TIMES * min(times) > 0


def increase_threshold(rows: Sequence[Row]) -> float | None:
    """Percent below which the quality axis is linear when the range is too wide for one scale; None for plain."""
    increases = sorted(abs(row["perplexity_increase"]) * 100 for row in rows)
    middle = increases[len(increases) // 2] if increases else 0.0
    return (
        max(middle, 0.1)
        if increases and increases[-1] > _WIDE_INCREASES * max(middle, 0.1)
        else None
    )
