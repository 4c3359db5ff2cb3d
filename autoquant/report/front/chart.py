"""The front in characters, for the terminal: request time to the right, loss of quality upwards. No wider than 80 columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from autoquant.records import ORIGINAL_LABEL
from autoquant.report.front.scales import (
    Row,
    drawable,
    increase_threshold,
    left_out_note,
    staircase,
    wide_times,
)
from autoquant.report.words import increase_heading, increase_words

_WIDEST, _HEIGHT = 80, 16
_LEAST_CELLS = 10
_CELLS_PER_TIME, _CELLS_PER_PERCENTAGE = (
    10,
    3,
)  # from one number beside an axis to the next, at least


@dataclass(frozen=True, slots=True)
class _Glyphs:
    """The characters of a drawing; `points` by importance, the most important first."""

    points: dict[str, str]
    across: str
    down: str
    turn: str
    axis: str
    row_tick: str
    origin: str
    column_tick: str


_DRAWN = _Glyphs(
    {
        "recommended": "★",
        "unquantized": "■",
        "on the front": "●",
        "uniform": "◇",
        "heuristic": "△",
        "bits alone": "▽",
        "other": "·",
    },
    *"─│┐│┤└┬",
)
_ASCII = _Glyphs(
    {
        "recommended": ">",
        "unquantized": "#",
        "on the front": "*",
        "uniform": "u",
        "heuristic": "h",
        "bits alone": "b",
        "other": ".",
    },
    *"-|+||+|",
)


@dataclass(frozen=True, slots=True)
class FrontChart:
    """Proven plans as points and the front as a line, in ASCII where the terminal has nothing else.

    Args:
        rows: Those of `Study.rows`.
    """

    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = _ASCII if options.ascii_only else _DRAWN
        for line in chart_lines(self.rows, min(options.max_width, _WIDEST), glyphs):
            yield Text(line, no_wrap=True, overflow="crop")


@dataclass(frozen=True, slots=True)
class _Axis:
    """A scale from values to cells: `bend` makes it linear or not, `low` and `high` are bent values."""

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
        return min(
            int((self.bend(value) - self.low) / (self.high - self.low) * self.cells), self.cells - 1
        )

    def holds(self, value: float) -> bool:
        return self.low <= self.bend(value) <= self.high


def chart_lines(rows: Sequence[Row], width: int, glyphs: _Glyphs = _DRAWN) -> list[str]:
    """The chart, line by line, below a line that names the axis of quality; nothing where no row can be drawn."""
    shown = [row for row in rows if drawable(row)]
    if not shown:
        return [left_out_note(rows)] if rows else []
    increases = _increase_axis(shown)
    labels = _row_labels(increases, increase_threshold(shown))
    margin = max(map(len, labels.values()), default=0) + 1
    times = _time_axis(shown, max(width - margin - 1, _LEAST_CELLS))
    grid = [[" "] * times.cells for _ in range(increases.cells)]
    _draw_line(grid, shown, times, increases, glyphs)
    covered = _draw_points(grid, shown, times, increases, glyphs)
    lines = [f"{increase_heading(rows)} [%]"]
    for cell in reversed(range(increases.cells)):
        tick = glyphs.row_tick if cell in labels else glyphs.axis
        lines.append(f"{labels.get(cell, ''):>{margin - 1}} {tick}{''.join(grid[cell])}".rstrip())
    return [
        *lines,
        *_time_lines(times, margin, glyphs),
        *_legend(shown, glyphs),
        *_notes(rows, covered),
    ]


def _time_axis(rows: Sequence[Row], cells: int) -> _Axis:
    return _Axis.over(
        [row["measured_request_ms"] for row in rows], math.log if wide_times(rows) else float, cells
    )


def _increase_axis(rows: Sequence[Row]) -> _Axis:
    """Percent; beyond the threshold of a wide range, tenfold steps are as high as the whole part below it."""
    threshold = increase_threshold(rows)

    def bend(percent: float) -> float:
        if threshold is None or abs(percent) <= threshold:
            return percent / (threshold or 1.0)
        return math.copysign(1 + math.log10(abs(percent) / threshold), percent)

    return _Axis.over([0.0, *(row["perplexity_increase"] * 100 for row in rows)], bend, _HEIGHT)


def _row_labels(axis: _Axis, threshold: float | None) -> dict[int, str]:
    """Percentages by the cell that they stand at, two cells apart at least, small numbers first."""
    labels: dict[int, str] = {}
    if threshold is None:
        ticks = _round_ticks(axis, _CELLS_PER_PERCENTAGE)
    else:
        above = [
            float(f"{threshold * factor:.0e}") for factor in (0.5, 1, 3, 10, 30, 100, 1e3, 1e4, 1e5)
        ]
        ticks = [0.0, *above, *(-value for value in above)]
    for value in sorted(ticks, key=abs):
        if axis.holds(value) and all(abs(axis.cell(value) - cell) > 1 for cell in labels):
            labels[axis.cell(value)] = f"{value:g}"
    return labels


def _round_ticks(axis: _Axis, cells_apart: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten on a linear axis, no closer than so many cells."""
    least = (axis.high - axis.low) / (axis.cells / cells_apart)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    numbers = range(math.ceil(axis.low / step), math.floor(axis.high / step) + 1)
    return [float(f"{number * step:.6g}") for number in numbers]


def _draw_line(
    grid: list[list[str]], rows: Sequence[Row], times: _Axis, increases: _Axis, glyphs: _Glyphs
) -> None:
    """From each step of the front to the right until the next one, then down to it."""
    cells = [_cells(row, times, increases) for row in staircase(rows)]
    for (column, line), (next_column, next_line) in itertools.pairwise(cells):
        for between in range(column, next_column):
            grid[line][between] = glyphs.across
        for between in range(next_line + 1, line):
            grid[between][next_column] = glyphs.down
        if line != next_line:
            grid[line][next_column] = glyphs.turn


def _draw_points(
    grid: list[list[str]], rows: Sequence[Row], times: _Axis, increases: _Axis, glyphs: _Glyphs
) -> list[Row]:
    """Put every row's character into its cell; the rows that a more important one covers are given back."""
    taken: set[tuple[int, int]] = set()
    covered = []
    order = list(glyphs.points)
    for row in sorted(rows, key=lambda row: order.index(_family(row))):
        column, line = _cells(row, times, increases)
        if (column, line) in taken:
            covered.append(row)
            continue
        taken.add((column, line))
        grid[line][column] = glyphs.points[_family(row)]
    return covered


def _cells(row: Row, times: _Axis, increases: _Axis) -> tuple[int, int]:
    return times.cell(row["measured_request_ms"]), increases.cell(row["perplexity_increase"] * 100)


def _family(row: Row) -> str:
    if row["recommended"]:
        return "recommended"
    if row["label"] == ORIGINAL_LABEL:
        return "unquantized"
    if row["on_front"]:
        return "on the front"
    return {"uniform": "uniform", "heuristic": "heuristic", "bits": "bits alone"}.get(
        row["kind"], "other"
    )


def _time_lines(axis: _Axis, margin: int, glyphs: _Glyphs) -> list[str]:
    """The axis of time with its ticks, their numbers, and its name."""
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
    name = "Time of one request [ms]"
    return [
        f"{indent}{glyphs.origin}{''.join(rule)}",
        f"{indent} {''.join(numbers).rstrip()}",
        f"{indent} {name:>{axis.cells}}",
    ]


def _time_ticks(axis: _Axis) -> list[float]:
    """Round numbers on the axis, about as many as have room."""
    if axis.bend is not math.log:
        return [value for value in _round_ticks(axis, _CELLS_PER_TIME) if value > 0]
    powers = range(math.floor(axis.low / math.log(10)), math.ceil(axis.high / math.log(10)) + 1)
    ticks = [float(f"{digit * 10.0**power:.6g}") for power in powers for digit in (1, 2, 5)]
    return [value for value in ticks if axis.holds(value)]


def _legend(rows: Sequence[Row], glyphs: _Glyphs) -> list[str]:
    families = {_family(row) for row in rows}
    parts = [f"{glyph} {name}" for name, glyph in glyphs.points.items() if name in families]
    return ["   ".join(parts)]


def _notes(rows: Sequence[Row], covered: Sequence[Row]) -> list[str]:
    hidden = ", ".join(f"{row['label']} ({increase_words(row)})" for row in covered)
    return [
        note
        for note in (f"covered by other points: {hidden}" if hidden else "", left_out_note(rows))
        if note
    ]
