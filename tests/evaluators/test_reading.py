"""Texts of every form: read in bounded pieces, or refused with what to do."""

import bz2
import gzip
import json
import tracemalloc

import pytest

from autoquant.errors import TextError
from autoquant.evaluators.reading import file_pieces

ROWS = [{"id": i, "text": f"Row number {i} has words."} for i in range(50)]


@pytest.mark.parametrize("word", ["measure ", "量化是把权重", "a"])
def test_a_line_of_any_length_is_read_in_pieces_of_bounded_size(tmp_path, word):
    path = tmp_path / "line.txt"
    path.write_text(text := word * (1_000_000 // len(word)))
    pieces = list(file_pieces(path))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 400_000 and len(pieces) > 3


def test_no_word_of_a_long_line_is_cut(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("measure " * 100_000)
    assert {word for piece in file_pieces(path) for word in piece.split()} == {"measure"}


def test_the_first_piece_of_a_large_file_takes_little_memory(tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("measure " * 4_000_000)
    tracemalloc.start()
    next(file_pieces(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("text.gz", gzip.compress(b"some words", mtime=0), "--eval-data under a name"),
        ("text.txt.gz", gzip.compress(b"some words", mtime=0), "unpack it"),
        ("text.txt", bz2.compress(b"some words"), "unpack it"),
        ("text.txt", "some words".encode("utf-16"), "iconv -f utf-16"),
        ("text.txt", "un café".encode("latin-1") + b" noir", "iconv -f latin1"),
        ("text.txt", "some words".encode("utf-16-le"), "zero bytes"),
        ("rows.jsonl", b'{"text": "a"}\n', "--eval-data"),
        ("rows.csv", b"text\na\n", "--eval-data"),
        ("rows.txt", "\n".join(map(json.dumps, ROWS)).encode(), "--eval-data"),
        ("rows.json", json.dumps(ROWS).encode(), "--eval-data"),
    ],
)
def test_what_is_no_plain_text_is_refused_with_what_to_do(tmp_path, name, content, advice):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError) as refused:
        list(file_pieces(path))
    message = str(refused.value)
    assert str(path) in message and advice in message and "\n" not in message


def test_text_about_json_is_text(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text('{"a": 1}\nis an object of JSON.\n')
    assert list(file_pieces(path)) == [path.read_text()]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "marked.txt"
    path.write_bytes("\ufeffFirst words.\n".encode())
    assert list(file_pieces(path)) == ["First words.\n"]
