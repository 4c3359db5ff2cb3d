"""The front in characters, for the terminal. No wider than 80 columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from autoquant.report.front.geometry import (
    FAMILIES,
    LINE_LABEL,
    TIME_TITLE,
    Family,
    Front,
    Point,
    Row,
    make_front,
)
from autoquant.report.words import increase_words

_WIDEST, _HEIGHT = 80, 16
_LEAST_CELLS = 10
_CELLS_PER_TIME, _CELLS_PER_PERCENTAGE = 10, 3  # between two numbers of an axis, at least


@dataclass(frozen=True, slots=True)
class _Glyphs:
    """The characters of a drawing."""

    ascii: bool
    across: str
    down: str
    turn: str
    axis: str
    row_tick: str
    origin: str
    column_tick: str

    def of(self, family: Family) -> str:
        return family.ascii if self.ascii else family.glyph


_DRAWN = _Glyphs(False, *"─│┐│┤└┬")
_ASCII = _Glyphs(True, *"-|+||+|")


@dataclass(frozen=True, slots=True)
class FrontChart:
    """Proven plans as points, in ASCII if the terminal has nothing else.

    Args:
        rows: The rows of `Study.rows`.
    """

    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = _ASCII if options.ascii_only else _DRAWN
        width = min(options.max_width, _WIDEST)
        for line in _chart_lines(make_front(self.rows), width, glyphs):
            yield Text(line, no_wrap=True, overflow="crop")


@dataclass(frozen=True, slots=True)
class _Axis:
    """A scale from values to cells. `low` and `high` are values after `bend`."""

    bend: Callable[[float], float]
    low: float
    high: float
    cells: int

    @classmethod
    def over(cls, values: Sequence[float], bend: Callable[[float], float], cells: int) -> _Axis:
        bent = [bend(value) for value in values]
        room = (max(bent) - min(bent)) * 0.04 or 0.5
        return cls(bend, min(bent) - room, max(bent) + room, cells)

    def cell(self, value: float) -> int:
        share = (self.bend(value) - self.low) / (self.high - self.low)
        return min(int(share * self.cells), self.cells - 1)

    def holds(self, value: float) -> bool:
        return self.low <= self.bend(value) <= self.high


class _Canvas:
    """A grid of characters over both axes. Row 0 is the lowest."""

    def __init__(self, times: _Axis, increases: _Axis, glyphs: _Glyphs) -> None:
        self.times, self.increases, self.glyphs = times, increases, glyphs
        self.grid = [[" "] * times.cells for _ in range(increases.cells)]

    def cells(self, point: Point) -> tuple[int, int]:
        """Return column and row of a point."""
        return self.times.cell(point.request_ms), self.increases.cell(point.increase)

    def draw_line(self, steps: Sequence[Point]) -> None:
        """Draw from each step to the right until the next one, then down to it."""
        cells = [self.cells(point) for point in steps]
        for (column, row), (next_column, next_row) in itertools.pairwise(cells):
            for between in range(column, next_column):
                self.grid[row][between] = self.glyphs.across
            for between in range(next_row + 1, row):
                self.grid[between][next_column] = self.glyphs.down
            if row != next_row:
                self.grid[row][next_column] = self.glyphs.turn

    def draw_points(self, points: Sequence[Point]) -> list[Point]:
        """Draw the points and return those that a more important one covers."""
        taken: set[tuple[int, int]] = set()
        covered = []
        for point in sorted(points, key=lambda point: FAMILIES.index(point.family)):
            column, row = self.cells(point)
            if (column, row) in taken:
                covered.append(point)
                continue
            taken.add((column, row))
            self.grid[row][column] = self.glyphs.of(point.family)
        return covered


def _chart_lines(front: Front, width: int, glyphs: _Glyphs) -> list[str]:
    """Return the chart line by line, or only its note if no plan can be drawn."""
    points = front.drawn
    if not points:
        return [front.note] if front.points else []
    increases = _increase_axis(front)
    labels = _row_labels(increases, front.linear_to)
    margin = max(map(len, labels.values()), default=0) + 1
    times = _time_axis(front, max(width - margin - 1, _LEAST_CELLS))
    canvas = _Canvas(times, increases, glyphs)
    canvas.draw_line(front.line)
    covered = canvas.draw_points(points)
    lines = [f"{front.title} [%]"]
    for cell in reversed(range(increases.cells)):
        tick = glyphs.row_tick if cell in labels else glyphs.axis
        text = f"{labels.get(cell, ''):>{margin - 1}} {tick}{''.join(canvas.grid[cell])}"
        lines.append(text.rstrip())
    lines += _time_lines(times, margin, glyphs)
    return [*lines, *_legend(front, width, glyphs), *_notes(front, covered)]


def _time_axis(front: Front, cells: int) -> _Axis:
    bend = math.log if front.log_times else float
    return _Axis.over([point.request_ms for point in front.drawn], bend, cells)


def _increase_axis(front: Front) -> _Axis:
    """Return the axis of quality, in percent.

    Above its linear part, a tenfold step is as high as the whole linear part.
    """
    linear_to = front.linear_to

    def bend(percent: float) -> float:
        if linear_to is None or abs(percent) <= linear_to:
            return percent / (linear_to or 1.0)
        return math.copysign(1 + math.log10(abs(percent) / linear_to), percent)

    return _Axis.over([0.0, *(point.increase for point in front.drawn)], bend, _HEIGHT)


def _row_labels(axis: _Axis, linear_to: float | None) -> dict[int, str]:
    """Return percentages by their cell, at least two cells apart, small numbers first."""
    labels: dict[int, str] = {}
    if linear_to is None:
        ticks = _round_ticks(axis, _CELLS_PER_PERCENTAGE)
    else:
        factors = (0.5, 1, 3, 10, 30, 100, 1e3, 1e4, 1e5)
        above = [float(f"{linear_to * factor:.0e}") for factor in factors]
        ticks = [0.0, *above, *(-value for value in above)]
    for value in sorted(ticks, key=abs):
        if axis.holds(value) and all(abs(axis.cell(value) - cell) > 1 for cell in labels):
            labels[axis.cell(value)] = f"{value:g}"
    return labels


def _round_ticks(axis: _Axis, cells_apart: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten, at least `cells_apart` cells apart."""
    least = (axis.high - axis.low) / (axis.cells / cells_apart)
    power = 10.0 ** math.floor(math.log10(least))
    steps = [factor * power for factor in (1, 2, 5, 10)]
    step = next(step for step in steps if step >= least)
    first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
    return [_rounded(number * step) for number in range(first, last + 1)]


def _rounded(value: float) -> float:
    """Return a multiple of a decimal fraction without the noise of binary ones: 0.3 for 3 * 0.1."""
    return float(f"{value:.6g}")


def _time_lines(axis: _Axis, margin: int, glyphs: _Glyphs) -> list[str]:
    """Return the axis of time with its ticks, their numbers, and its name."""
    rule, numbers = [glyphs.across] * axis.cells, [" "] * axis.cells
    free_from = 0
    for value in _time_ticks(axis):
        column, text = axis.cell(value), f"{value:g}"
        start = max(column - len(text) // 2, 0)
        if start < free_from or start + len(text) > axis.cells:
            continue
        rule[column] = glyphs.column_tick
        numbers[start : start + len(text)] = text
        free_from = start + len(text) + 2
    indent = " " * margin
    return [
        f"{indent}{glyphs.origin}{''.join(rule)}",
        f"{indent} {''.join(numbers).rstrip()}",
        f"{indent} {TIME_TITLE:>{axis.cells}}",
    ]


def _time_ticks(axis: _Axis) -> list[float]:
    """Return round numbers on the axis, about as many as have room."""
    if axis.bend is not math.log:
        return [value for value in _round_ticks(axis, _CELLS_PER_TIME) if value > 0]
    # The ends of a bent axis are logarithms.
    ten = math.log(10)
    first, last = math.floor(axis.low / ten), math.ceil(axis.high / ten)
    ticks = []
    for power in range(first, last + 1):
        ticks += [_rounded(digit * 10.0**power) for digit in (1, 2, 5)]
    return [value for value in ticks if axis.holds(value)]


def _legend(front: Front, width: int, glyphs: _Glyphs) -> list[str]:
    """Return the legend in lines that fit the width."""
    lines: list[str] = []
    for part in [*(f"{glyphs.of(each)} {each.name}" for each in front.families), LINE_LABEL]:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f"   {part}"
        else:
            lines.append(part)
    return lines


def _notes(front: Front, covered: Sequence[Point]) -> list[str]:
    hidden = ", ".join(f"{point.row['label']} ({increase_words(point.row)})" for point in covered)
    return [text for text in (hidden and f"covered by other points: {hidden}", front.note) if text]
