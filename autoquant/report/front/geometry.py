"""What a front looks like in every drawing: points, families, the line, scales and labels.

The picture, the page and the chart in characters draw a `Front`. None decides for itself what a
plan is, whether it is on the front, or where an axis stops being linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant.records import ORIGINAL_LABEL
from autoquant.report.visible import visible
from autoquant.report.words import increase_heading

TIME_TITLE = "Time of one request [ms]"
LINE_LABEL = "line: no plan is both faster and better"

_WIDE_TIMES, _WIDE_INCREASES = 8.0, 12.0  # ratios above which an axis is not linear
_LABEL_LENGTH = 28

Row = Mapping[str, Any]
"""One of `Study.rows`."""


@dataclass(frozen=True, slots=True)
class Family:
    """Plans that look alike. Filled symbols are on the front, open ones are dominated.

    Attributes:
        marker: The shape for matplotlib.
        symbol: The shape for plotly.
        glyph: The same shape as a character.
        ascii: The character for terminals that have only ASCII.
    """

    name: str
    marker: str
    symbol: str
    glyph: str
    ascii: str
    filled: bool = True


RECOMMENDED = Family("recommended", "*", "star", "★", ">")
UNQUANTIZED = Family("unquantized", "s", "square", "■", "#")
_ON_FRONT = {
    "searched": Family("searched, on the front", "o", "circle", "●", "*"),
    "uniform": Family("uniform, on the front", "D", "diamond", "◆", "U"),
    "heuristic": Family("heuristic, on the front", "^", "triangle-up", "▲", "H"),
    "bits": Family("bits alone, on the front", "v", "triangle-down", "▼", "B"),
}
_DOMINATED = {
    "uniform": Family("uniform, dominated", "D", "diamond-open", "◇", "u", filled=False),
    "heuristic": Family("heuristic, dominated", "^", "triangle-up-open", "△", "h", filled=False),
    "bits": Family("bits alone, dominated", "v", "triangle-down-open", "▽", "b", filled=False),
    "searched": Family("searched, dominated", "o", "circle-open", "○", ".", filled=False),
}
FAMILIES = (RECOMMENDED, UNQUANTIZED, *_ON_FRONT.values(), *_DOMINATED.values())
"""The most important first."""


def family(row: Row) -> Family:
    """Return the family of a plan: its role, then its kind and whether it is on the front."""
    if row["recommended"]:
        return RECOMMENDED
    if row["label"] == ORIGINAL_LABEL:
        return UNQUANTIZED
    kinds = _ON_FRONT if row["on_front"] else _DOMINATED
    return kinds.get(row["kind"], kinds["searched"])


@dataclass(frozen=True, slots=True)
class Point:
    """A proven plan in a drawing.

    Attributes:
        increase: How much worse quality is than unquantized, in percent.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        memory_share: 0 for the smallest plan of the front, 1 for the largest.
    """

    row: Row
    family: Family
    request_ms: float
    increase: float
    low: float
    high: float
    memory_share: float

    @property
    def drawable(self) -> bool:
        """Whether the point has finite numbers on both axes."""
        return math.isfinite(self.request_ms) and math.isfinite(self.increase)

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def is_unquantized(self) -> bool:
        """Whether the plan is the unquantized model, also if that is what is recommended."""
        return bool(self.row["label"] == ORIGINAL_LABEL)

    @property
    def label(self) -> str:
        """A short name to write beside the point."""
        if self.is_unquantized:
            return "unquantized"
        text = str(self.row["label"]).removeprefix("uniform").lstrip(" :-")
        text = visible(text or str(self.row["label"]))
        return text if len(text) <= _LABEL_LENGTH else f"{text[: _LABEL_LENGTH - 1]}…"


@dataclass(frozen=True, slots=True)
class Front:
    """Proven plans, ready to be drawn.

    Attributes:
        points: Every plan, in the order of the rows.
        title: What the axis of quality shows, without its unit.
    """

    points: tuple[Point, ...]
    title: str

    @property
    def drawn(self) -> list[Point]:
        """The points that have a place on both axes."""
        return [point for point in self.points if point.drawable]

    @property
    def families(self) -> list[Family]:
        """The families that are drawn, the most important first."""
        present = {point.family for point in self.drawn}
        return [each for each in FAMILIES if each in present]

    @property
    def line(self) -> list[Point]:
        """The plans on the front that no plan beats in time and quality, fastest first.

        A plan is on the front by time, quality and memory, and a drawing has no axis for memory.
        So a filled point above the line is there because it is smaller.
        """
        steps: list[Point] = []
        on_front = [point for point in self.drawn if point.row["on_front"]]
        for point in sorted(on_front, key=lambda point: (point.request_ms, point.increase)):
            if not steps or point.increase < steps[-1].increase:
                steps.append(point)
        return steps

    @property
    def note(self) -> str:
        """How many plans cannot be drawn, or an empty text."""
        left_out = len(self.points) - len(self.drawn)
        return f"not shown: {left_out} plans without finite quality" if left_out else ""

    @property
    def log_times(self) -> bool:
        """Whether the axis of times is logarithmic."""
        times = [point.request_ms for point in self.drawn]
        return bool(times) and max(times) > _WIDE_TIMES * min(times) > 0

    @property
    def linear_to(self) -> float | None:
        """Percent up to which a wide axis of quality is linear, or None for a linear axis."""
        increases = sorted(abs(point.increase) for point in self.drawn)
        if not increases:
            return None
        middle = max(increases[len(increases) // 2], 0.1)
        return middle if increases[-1] > _WIDE_INCREASES * middle else None


def make_front(rows: Sequence[Row]) -> Front:
    """Return the front of the rows of `Study.rows`."""
    stored = [row["memory_bytes"] for row in rows]
    smallest, span = min(stored, default=0), max(stored, default=0) - min(stored, default=0)

    def point(row: Row) -> Point:
        return Point(
            row=row,
            family=family(row),
            request_ms=row["measured_request_ms"],
            increase=row["perplexity_increase"] * 100,
            low=row["perplexity_increase_low"] * 100,
            high=row["perplexity_increase_high"] * 100,
            memory_share=(row["memory_bytes"] - smallest) / span if span else 0.5,
        )

    return Front(tuple(map(point, rows)), increase_heading(rows))
