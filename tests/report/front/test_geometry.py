"""What every drawing of a front has in common."""

import math

import pytest
from builders.front_rows import ROWS, row

from autoquant.records import BASELINES
from autoquant.report.front.geometry import FAMILIES, family, make_front


def labels(points):
    return [point.row["label"] for point in points]


def test_the_line_holds_the_plans_that_no_other_beats_in_time_and_quality():
    assert labels(make_front(ROWS).line) == ["front 2", "front 1", "original"]


def test_a_plan_that_is_on_the_front_for_its_memory_alone_is_filled_and_above_the_line():
    small = row("small", "front", 150.0, 0.05, memory_bytes=1)
    front = make_front([*ROWS, small])
    assert "small" not in labels(front.line)
    assert family(small).name == "searched, on the front" and family(small).filled


def test_the_line_holds_nothing_that_is_not_on_the_front():
    twin = row("twin", "front", 100.0, 0.03, on_front=False)
    assert "twin" not in labels(make_front([twin, *ROWS]).line)


@pytest.mark.parametrize("kind", ["front", "refined", "solved", "front: aimed 2"])
def test_whatever_the_search_proposed_is_searched(kind):
    assert family(row("a", kind, 1.0, 0.0)).name == "searched, on the front"
    assert family(row("a", kind, 1.0, 0.0, on_front=False)).name == "searched, dominated"


@pytest.mark.parametrize("on_front", [True, False])
def test_every_kind_that_has_to_be_beaten_looks_different(on_front):
    families = [
        family(row(kind, kind, 1.0, 0.0, on_front=on_front)) for kind in (*BASELINES, "front")
    ]
    for look in ("name", "marker", "symbol", "glyph", "ascii"):
        assert len({getattr(each, look) for each in families}) == 4
    assert all(each.filled is on_front for each in families)


@pytest.mark.parametrize("look", ["name", "symbol", "glyph", "ascii"])
def test_no_two_families_look_alike(look):
    assert len({getattr(each, look) for each in FAMILIES}) == len(FAMILIES)


def test_the_smallest_and_the_largest_plan_end_the_scale_of_memory():
    shares = {point.row["label"]: point.memory_share for point in make_front(ROWS).points}
    assert shares["front 2"] == 0 and shares["original"] == 1
    assert [point.memory_share for point in make_front(ROWS[:1]).points] == [0.5]


def test_a_plan_without_finite_quality_is_counted_and_not_drawn():
    front = make_front([*ROWS, row("broken", "front", 50.0, math.inf)])
    assert "broken" not in labels(front.drawn)
    assert front.note == "not shown: 1 plans without finite quality"
    assert make_front(ROWS).note == ""


def test_only_a_wide_range_bends_an_axis():
    assert (make_front(ROWS).log_times, make_front(ROWS).linear_to) == (False, None)
    wide = make_front([*ROWS, row("far", "front", 9000.0, 40.0)])
    assert wide.log_times and wide.linear_to is not None
