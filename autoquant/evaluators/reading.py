"""Read a text file in pieces of bounded size, and refuse what is no plain UTF-8 text."""

from __future__ import annotations

import codecs
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from autoquant.errors import TextError
from autoquant.files import MOST_TEXT_BYTES

_READ_CHARACTERS = 200_000
_LONGEST_REST = 50_000  # of the line that a piece ends in
_HEAD_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 20
_LOOKED_AT_BYTES = 4 * MOST_TEXT_BYTES  # readers take some ten MiB at a time
_PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_BLANK_LINES = ("blank lines", "take them out")
_LONG_LINE = ("a line", "break it into shorter ones")
_TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")


def file_pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file in pieces that end with a line, or in a long line with a word.

    Raises:
        TextError: The file cannot be read, or is not plain UTF-8 text. The message says how to
            give what it holds.
    """
    try:
        _check_form(path)
        yield from _pieces(path)
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text ({_first_bad_byte(path)}): convert it, e.g. `iconv -f"
            f" latin1 -t utf-8 {path} > text.txt`"
        ) from error
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


def _pieces(path: Path) -> Iterator[str]:
    rest = ""
    with path.open(encoding="utf-8-sig") as file:
        while text := file.read(_READ_CHARACTERS):
            end = file.readline(_LONGEST_REST)
            piece, rest = rest + text + end, ""
            if "\0" in piece:
                raise TextError(f"{path} holds zero bytes, which no text does: give plain text")
            if len(end) == _LONGEST_REST and not end.endswith("\n"):
                piece, rest = _cut(piece)
            yield piece
    if rest:
        yield rest


def _cut(piece: str) -> tuple[str, str]:
    """Cut a piece before its last word, or leave it whole if that word is most of it."""
    cut = piece.rfind(" ", len(piece) // 2)
    return (piece[:cut], piece[cut:]) if cut > 0 else (piece, "")


def row_pieces(text: str) -> Iterator[str]:
    """Yield a row in pieces of bounded size: tokenizers take fifty times the memory of a text."""
    longest = _READ_CHARACTERS + _LONGEST_REST
    start = 0
    while len(text) - start > longest:
        piece, _ = _cut(text[start : start + longest])
        yield piece
        start += len(piece)
    yield text[start:]


def check_lines(path: Path) -> None:
    """Check that no line of a file, packed or not, is so long that a reader takes all memory.

    Blank lines count as one, since no reader stops at them. Only as much is read as any text needs.
    What cannot be unpacked is left to the reader.

    Raises:
        TextError: A line is too long, or there are too many blank ones.
    """
    import fsspec

    length = 0
    with (
        suppress(OSError, EOFError, ValueError, ImportError, zlib.error, lzma.LZMAError),
        fsspec.open(str(path), "rb", compression="infer") as file,
    ):
        for _ in range(_LOOKED_AT_BYTES // _CHUNK_BYTES):
            chunk = file.read(_CHUNK_BYTES)
            if not chunk:
                return
            end, blank = chunk.rfind(b"\n"), not chunk.strip()
            length = length + len(chunk) if blank or end < 0 else len(chunk) - end - 1
            if length > MOST_TEXT_BYTES:
                what, advice = _BLANK_LINES if blank else _LONG_LINE
                raise TextError(
                    f"{path} has {what} of more than {MOST_TEXT_BYTES:,} bytes: {advice}"
                )


def _check_form(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(_PACKED):
        raise TextError(
            f"{path} is compressed: unpack it, or give it with --eval-data under a name that says"
            " what is in it, such as text.txt.gz"
        )
    if head.startswith(_WIDE):
        raise TextError(
            f"{path} is UTF-16 or UTF-32 text: convert it, `iconv -f utf-16 -t utf-8 {path} >"
            " text.txt`"
        )
    if path.suffix.lower() in _TABLES or _is_json_lines(head):
        raise TextError(
            f"{path} holds rows of data, such as JSON, whose markup would be judged as text: give"
            f" it with --eval-data {path}[:COLUMN] instead of --eval-text"
        )


def _is_json_lines(head: bytes) -> bool:
    """Check whether the first two lines are objects of JSON."""
    lines = [line for line in head.splitlines()[:-1] if line.strip()][:2]
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    except ValueError:
        return False


def _first_bad_byte(path: Path) -> str:
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while chunk := file.read(_HEAD_BYTES):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                kept = len(error.object) - len(chunk)
                return f"{error.reason} at byte {start - kept + error.start}"
            start += len(chunk)
    return "it ends within a character"
