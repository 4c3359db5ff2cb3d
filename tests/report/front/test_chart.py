"""The front in characters."""

import io
import math

import pytest
from builders.front_rows import ROWS, row
from rich.console import Console

from autoquant.report.front.chart import FrontChart


def drawn(rows, width=80, encoding="utf-8"):
    """The lines that a terminal of this width and encoding gets."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width).print(FrontChart(rows))
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()


def place(lines, glyph):
    """(column, line from below) of the only such character above the axis of time."""
    area = [line for line in lines[1:] if "│" in line[:8] or "┤" in line[:8]]
    found = [(line.index(glyph), -number) for number, line in enumerate(area) if glyph in line]
    assert len(found) == 1
    return found[0]


def test_faster_is_to_the_left_and_worse_is_higher():
    lines = drawn(ROWS)
    recommended, fast, original, uniform = (place(lines, glyph) for glyph in "★●■◇")
    assert fast[0] < recommended[0] < uniform[0] < original[0]
    assert original[1] < recommended[1] <= uniform[1] < fast[1]
    assert lines[0] == "Perplexity increase [%]"
    assert (
        "★ recommended   ■ unquantized   ● searched, on the front   ◇ uniform, dominated" in lines
    )
    assert lines[-1] == "line: no plan is both faster and better"


def test_the_line_of_the_front_goes_through_its_points_only():
    lines = drawn(ROWS)
    row_of_fast = next(line for line in lines if "●" in line and "on the front" not in line)
    assert row_of_fast.rstrip().endswith("─┐")
    turn = row_of_fast.index("┐")
    assert turn == place(lines, "★")[0], "down where the next one begins"


@pytest.mark.parametrize("width", [80, 200])
def test_it_is_no_wider_than_80_columns(width):
    assert max(map(len, drawn(ROWS, width))) <= 80


def test_it_fits_a_narrow_terminal():
    assert max(map(len, drawn(ROWS, 40))) <= 40


def test_a_terminal_without_more_gets_ascii():
    lines = drawn(ROWS, encoding="ascii")
    assert (
        "> recommended   # unquantized   * searched, on the front   u uniform, dominated" in lines
    )
    assert all(line.isascii() for line in lines)
    assert any("-+" in line for line in lines)


def test_numbers_stand_at_their_places_on_both_axes():
    lines = drawn(
        [row("original", "original", 100.0, 0.0), row("a", "front", 50.0, 0.01, recommended=True)]
    )
    assert next(line for line in lines if "■" in line).startswith("  0 ┤")
    assert next(line for line in lines if "★" in line and "┤" in line).startswith("  1 ┤")
    ticks, numbers = lines[-4], lines[-3]
    assert abs(numbers.index("100") + 1 - place(lines, "■")[0]) <= 1
    assert ticks[place(lines, "■")[0]] == "┬"
    assert lines[-2].endswith("Time of one request [ms]")


def test_a_wide_range_is_drawn_so_that_small_differences_show():
    far = row("bad", "front", 50.0, 30.0)
    lines = drawn([*ROWS, far, row("front 3", "front", 130.0, 0.001)])
    assert place(lines, "■")[1] < place(lines, "★")[1]


def test_what_is_covered_or_cannot_be_drawn_is_said():
    twin = row("twin", "front", 120.0, 0.003)
    broken = row("broken", "front", 50.0, math.inf)
    lines = drawn([*ROWS, twin, broken])
    assert "covered by other points: twin (+0.30%)" in lines
    assert "not shown: 1 plans without finite quality" in lines


def test_one_plan_alone_and_none_at_all_are_drawn_too():
    assert any("■" in line for line in drawn(ROWS[:1]))
    assert drawn([row("broken", "front", 50.0, math.nan)]) == [
        "not shown: 1 plans without finite quality"
    ]
    assert drawn([]) == []


def test_a_loss_of_ones_own_is_called_loss():
    assert (
        drawn([{**each, "perplexity": None, "measure": "loss"} for each in ROWS])[0]
        == "Loss increase [%]"
    )
