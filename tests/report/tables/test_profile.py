import io

import pytest
from builders.latencies import ROWS, SHAPES, latencies
from rich.console import Console

from autoquant.report.tables.profile import latencies_report, reason_lines, route_lines

FIRST, SECOND = SHAPES


def text(given=None, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(latencies_report(given or latencies(), width))
    return console.file.getvalue()


def block(given=None):
    """Lines of the first shape."""
    return text(given).split("\n\n")[0].splitlines()


def test_each_shape_is_a_block_under_its_name():
    printed = text()
    assert "512 x 256, bfloat16: model.layers.0-1.q_proj\n" in printed
    assert "1024 x 256 + bias, bfloat16\n" in printed


def test_candidates_are_best_first_at_the_first_m_and_the_best_of_each_column_is_marked():
    lines = [line for line in block() if "/" in line and ":" not in line]
    names = [line.split()[0] for line in lines]
    assert names == [
        "int8-row/plain/int8pack-mm",
        "int4-g32/packed/packed-mm",
        "bfloat16/plain/matmul",
        "float8-row/plain/dequantize-matmul",
        "int8-row/plain/int-mm",
        "int8-row/plain/dynamic",
        "int4-g64/packed/packed-mm",
    ]
    assert lines[0].split()[1:] == ["*10.0", "*20.0", "1600"]
    assert lines[4].split()[1:] == ["bounded", "25.0", "*200"]
    assert lines[5].split()[1:] == ["incorr.", "40.0", "440"]
    assert lines[6].split()[1:] == ["failed"] * 3


def test_what_is_unsupported_everywhere_has_a_reason_but_no_line():
    assert not any(line.startswith("float32") for line in block())
    assert "unsupported: float32/plain/matmul: float32 is wider than the model's bfloat16" in text()


def test_reasons_come_once_with_whom_and_where_they_concern():
    assert reason_lines(latencies().rows) == [
        "unsupported: float32/plain/matmul: float32 is wider than the model's bfloat16",
        "incorrect at m=1: int8-row/plain/dynamic: relative error 3",
        "bounded at m=1: int8-row/plain/int-mm: cannot win",
        "failed: int4-g64/packed/packed-mm: no compiler",
    ]


def test_routes_name_the_kernel_by_m_and_compare_with_unquantized():
    lines = route_lines(latencies().shapes()[FIRST])
    assert lines == [
        "best: int8-row/plain int8pack-mm up to m=4, int-mm above; 3.0x at m=1, 1.6x at m=4, 2.0x "
        "at m=512",
        "then: int4-g32/packed packed-mm; 2.5x at m=1, 1.1x at m=4, 0.0x at m=512",
        "no faster than unquantized at any m: float8",
    ]


def test_a_route_says_where_it_has_no_kernel():
    times = {
        ("bfloat16/plain", "matmul"): (30.0, 32.0, 400.0),
        ("int8-row/plain", "int-mm"): ("no", 16.0, 100.0),
    }
    lines = route_lines(latencies(times=times).shapes()[FIRST])
    assert lines == ["best: int8-row/plain int-mm (not at m=1); 2.0x at m=4, 4.0x at m=512"]


def test_totals_count_every_outcome_and_say_where_timings_came_from():
    printed = " ".join(text().split())
    assert (
        "48 timings (8 candidates at 6 shapes and m): 32 measured, 2 bounded away, 0 beaten in a "
        "try-out, "
        "6 unsupported, 2 incorrect, 6 failed." in printed
    )
    assert "8 were in the store, 40 are new and took 1m 15s to prepare and time." in printed
    assert "Test CPU, 2 threads: memory 50.0 GB/s; Tflop/s in bfloat16 0.300" in printed


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("rows", [(1,), ROWS, tuple(range(1, 13))])
def test_everything_fits_the_width_and_shows_every_m(width, rows):
    times = {
        ("bfloat16/plain", "matmul"): tuple(1234567.0 for _ in rows),
        ("int4-g128/cpu-packed", "dequantize-matmul"): tuple(12.0 for _ in rows),
    }
    printed = text(latencies(rows=rows, times=times), width)
    assert max(map(len, printed.splitlines())) <= width
    assert all(f"m={m}" in printed.replace("\n", " ").split() for m in rows)
    assert "dequantize-matmul" in printed and "1234567" in printed and "…" not in printed


def test_without_any_latency_there_are_reasons_only():
    printed = text(latencies(times={("bfloat16/plain", "matmul"): ("failed: out of memory",) * 3}))
    assert "failed: bfloat16/plain/matmul: out of memory" in printed
    assert "best:" not in printed and "µs" not in printed
