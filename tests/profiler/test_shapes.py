"""Shapes and rows as people write them."""

import pytest

from autoquant.errors import WorkloadError
from autoquant.profiler.shapes import parse_rows, parse_shapes, read_shapes
from autoquant.records import LinearShape


def shape(n, k, bias=False):
    return LinearShape(n=n, k=k, bias=bias, dtype="bfloat16")


def test_a_file_has_a_linear_a_line_with_bias_name_and_comments(tmp_path):
    path = tmp_path / "shapes.txt"
    path.write_text(
        "# a model\n\n4096x1024\n 64x32+bias  down_proj # why\n8x16 gate and up\n", encoding="utf-8"
    )
    assert read_shapes(path, "bfloat16").names == {
        shape(4096, 1024): (),
        shape(64, 32, bias=True): ("down_proj",),
        shape(8, 16): ("gate and up",),
    }


def test_a_shape_that_comes_again_is_timed_once_under_all_its_names():
    found = parse_shapes(["8x8 q", "8x8 k", "8x8+bias o", "8x8 q"], "bfloat16")
    assert found.names == {shape(8, 8): ("q", "k"), shape(8, 8, bias=True): ("o",)}


def test_a_shape_may_have_rows_of_its_own():
    found = parse_shapes(
        ["8x8 q", "64x8 lm head rows=16,1", "32x8 rows=4", "32x8 rows=2", "16x8  rows = 1"],
        "bfloat16",
    )
    assert found.rows == {shape(64, 8): (1, 16), shape(32, 8): (2, 4)}
    assert found.names[shape(64, 8)] == ("lm head",) and found.names[shape(16, 8)] == ("rows = 1",)
    for bad in ("8x8 rows=", "8x8 q rows=0", "8x8 rows=a,b"):
        with pytest.raises(WorkloadError, match="write how many rows"):
            parse_shapes([bad], "bfloat16")


@pytest.mark.parametrize(
    "line",
    [
        "4096",
        "4096x",
        "0x8",
        "-1x8",
        "4096 x 4096",
        "4096x4096+bias2",
        "8x8q",
        "8x99999999",
        "q 8x8",
    ],
)
def test_a_line_that_cannot_be_read_is_named_with_what_to_write(tmp_path, line):
    path = tmp_path / "shapes.txt"
    path.write_text(f"8x8\n{line}\n")
    with pytest.raises(WorkloadError) as caught:
        read_shapes(path, "bfloat16")
    message = str(caught.value)
    assert (
        f"{path}, line 2" in message
        and line in message
        and "4096x4096+bias" in message
        and "\n" not in message
    )


@pytest.mark.parametrize("content", [b"", b"\n# nothing\n", b"\xff\xfe\x00"])
def test_a_file_without_a_shape_is_refused(tmp_path, content):
    path = tmp_path / "shapes.txt"
    path.write_bytes(content)
    with pytest.raises(WorkloadError, match="OUTxIN"):
        read_shapes(path, "bfloat16")


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(WorkloadError, match="cannot read shapes from"):
        read_shapes(tmp_path / "missing.txt", "bfloat16")
    with pytest.raises(WorkloadError, match="no regular file"):
        read_shapes(tmp_path, "bfloat16")


def test_rows_are_sorted_and_come_once():
    assert parse_rows("2048, 1,16,1") == (1, 16, 2048)


@pytest.mark.parametrize("text", ["", "0", "1,", "1;2", "many", "1,-2", "1.5"])
def test_rows_that_cannot_be_read_are_refused(text):
    with pytest.raises(WorkloadError, match=r"1,16,2048"):
        parse_rows(text)
