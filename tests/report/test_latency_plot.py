import pytest
from builders.latencies import ROOFLINE, ROWS, SHAPES, TIMES, latencies

from autoquant.profiler.floor import floor_us
from autoquant.report.latency_plot import (
    FLOORS,
    drawn_formats,
    floor_line,
    format_lines,
    latency_range_us,
    render_latencies,
)

FIRST, SECOND = SHAPES
MANY = {("bfloat16/plain", "matmul"): (30.0, 32.0, 400.0)} | {
    (f"format{number}/plain", "kernel"): (10.0 + number, 11.0 + number, 100.0 + number)
    for number in range(14)
}


def test_a_line_is_a_format_with_its_fastest_kernel_at_each_m():
    lines = format_lines(latencies().shapes()[FIRST])
    assert list(lines) == ["unquantized", "int8-row/plain", "int4-g32/packed", "float8-row/plain"]
    assert {m: row["kernel"] for m, row in lines["int8-row/plain"].items()} == {
        1: "int8pack-mm",
        4: "int8pack-mm",
        512: "int-mm",
    }


def test_at_most_nine_formats_and_unquantized_are_drawn_and_the_rest_is_named():
    shapes = latencies(times=MANY).shapes()
    drawn, left_out = drawn_formats({shape: format_lines(rows) for shape, rows in shapes.items()})
    assert drawn == [f"format{number}/plain" for number in range(9)]
    assert left_out == [f"format{number}/plain" for number in range(9, 14)]
    picture = render_latencies(latencies(times=MANY), ".svg").decode()
    assert "not drawn, slower: format9/plain" in picture


def test_limits_are_those_of_the_roofline_for_16_8_and_4_bits():
    for floor, bits, arithmetic in zip(
        FLOORS, (16, 8, 4), ("bfloat16", "int8", "int8"), strict=True
    ):
        points = floor_line(latencies().roofline, FIRST, floor, ROWS)
        assert points[0][0] < 1 and points[-1][0] > 512
        for m, time_us in points:
            expected = floor_us(ROOFLINE, FIRST, m, bits / 8 * 512 * 256, arithmetic)
            assert time_us == pytest.approx(expected)


def test_a_panel_shows_the_limits_and_cuts_off_what_is_far_slower_than_unquantized():
    low, high = latency_range_us(
        latencies().roofline, FIRST, format_lines(latencies().shapes()[FIRST])
    )
    assert low < floor_line(latencies().roofline, FIRST, FLOORS[2], ROWS)[0][1]
    assert 400.0 < high < 9000.0


def test_the_picture_has_a_panel_per_shape_and_names_its_lines():
    picture = render_latencies(latencies(), ".svg").decode()
    names = [
        "512 x 256  q_proj", "1024 x 256 + bias", "unquantized", "int8-row/plain",
        "int4-g32/packed",
        "limit, 16-bit weights", "limit, 4-bit weights", "Latency of one linear",
        "tiny on Test CPU, 2 threads",
    ]  # fmt: skip
    assert [name for name in names if name not in picture] == []


def test_the_page_needs_no_network_and_tells_kernel_latency_and_limit_on_hover():
    page = render_latencies(latencies(), ".html").decode()
    assert 'src="http' not in page
    assert "Plotly.newPlot" in page
    assert "int8-row\\u002fplain\\u002fint-mm" in page and "limit 2.00" in page


@pytest.mark.parametrize(
    ("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".html", b"<!doctype html>")]
)
@pytest.mark.parametrize(
    "given",
    [
        latencies(rows=(1,)),
        latencies(times={("bfloat16/plain", "matmul"): ("failed: no memory",) * 3}),
        latencies(times={key: value for key, value in TIMES.items() if key[0] != "bfloat16/plain"}),
        latencies(shapes={shape: () for shape in list(SHAPES)[:1]}),
    ],
    ids=["one m", "nothing timed", "no unquantized", "one shape"],
)
def test_every_kind_of_latencies_can_be_drawn(given, suffix, begin):
    assert render_latencies(given, suffix).startswith(begin)


def test_another_suffix_is_refused():
    with pytest.raises(ValueError, match=r"\.gif"):
        render_latencies(latencies(), ".gif")
