import math

import pytest

from autoquant.records import BASELINES
from autoquant.report.front.plots import render
from autoquant.report.front.scales import staircase
from report.made_up_front import ROWS, row

TITLE = "model on a CPU"


def test_svg_names_axes_uniform_plans_and_the_original():
    text = render(ROWS, ".svg", TITLE).decode()
    found = [word for word in ("unquantized", "int8-row", "front 1", "Time of one request", TITLE) if word in text]
    assert len(found) == 5


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:1],
        [*ROWS, row("uniform int4-tensor", "uniform", 9000.0, 40.0)],
        [*ROWS, row("broken", "front", 90.0, math.inf)],
        [row("original", "original", 5.0, 0.0, perplexity=None, kl=None)],
        [row("original", "original", 200.0, 0.0, perplexity_increase_low=math.nan)],
    ],
)
def test_every_kind_of_front_can_be_drawn(rows, suffix):
    assert len(render(rows, suffix, TITLE)) > 1000


def test_plans_that_cannot_be_drawn_are_counted():
    text = render([*ROWS, row("broken", "front", 90.0, math.inf)], ".svg", TITLE).decode()
    assert "not shown: 1 plans" in text


def test_the_page_needs_no_network_and_tells_each_plan_on_hover():
    page = render(ROWS, ".html", TITLE).decode()
    assert 'src="http' not in page
    assert "Plotly.newPlot" in page
    assert '"modeBarButtonsToRemove": ["sendChartToCloud"]' in page
    assert "uniform int8-row" in page
    assert "plan front 1" in page


def test_another_suffix_is_refused():
    with pytest.raises(ValueError, match=r"\.gif"):
        render(ROWS, ".gif", TITLE)


def test_the_line_holds_only_plans_that_no_other_beats_in_time_and_quality():
    assert [step["label"] for step in staircase(ROWS)] == ["front 2", "front 1", "original"]


def test_every_kind_that_has_to_be_beaten_has_a_mark_of_its_own():
    from autoquant.report.front.plots import _family, _style

    rows = [{"kind": kind, "recommended": False, "label": kind, "on_front": False} for kind in BASELINES]
    assert len({_family(row) for row in rows}) == len({_style(row)["marker"] for row in rows}) == 3
