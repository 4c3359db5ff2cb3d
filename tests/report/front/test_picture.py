import math

import pytest
from builders.front_rows import ROWS, row

from autoquant.report.front.picture import render

TITLE = "model on a CPU"


def test_svg_names_axes_uniform_plans_and_the_original():
    text = render(ROWS, ".svg", TITLE).decode()
    found = [
        word
        for word in ("unquantized", "int8-row", "front 1", "Time of one request", TITLE)
        if word in text
    ]
    assert len(found) == 5


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:1],
        [*ROWS, row("uniform int4-tensor", "uniform", 9000.0, 40.0)],
        [*ROWS, row("broken", "front", 90.0, math.inf)],
        [row("original", "original", 5.0, 0.0, perplexity=None, kl=None)],
        [row("original", "original", 200.0, 0.0, perplexity_increase_low=math.nan)],
        [
            row("original", "original", 0.1261180152721707, 0.0),
            row("uniform int8-row", "uniform", 5.044720610886828, 0.0),
            row("front 1", "front", 0.2522360305443414, 0.5),
        ],
        [row("original", "original", 5.0, 0.0), row("front 1", "front", 5.000000000001, 0.0)],
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_front_can_be_drawn(rows, suffix):
    assert len(render(rows, suffix, TITLE)) > 1000


def test_plans_that_cannot_be_drawn_are_counted():
    text = render([*ROWS, row("broken", "front", 90.0, math.inf)], ".svg", TITLE).decode()
    assert "not shown: 1 plans" in text


def test_another_suffix_is_refused():
    with pytest.raises(ValueError, match=r"\.html"):
        render(ROWS, ".html", TITLE)
