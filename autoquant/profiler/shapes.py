"""Shapes and rows as people write them: `4096x4096+bias q_proj rows=1,16`, and `1,16,2048`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoquant.errors import WorkloadError, first_line
from autoquant.files import read_text
from autoquant.hints import did_you_mean_path
from autoquant.records import LinearShape

NamedShapes = dict[LinearShape, tuple[str, ...]]

_LINE = re.compile(
    r"([1-9]\d{0,6})x([1-9]\d{0,6})(\+bias)?(?:\s+(?!rows=)(\S.*?))?(?:\s+rows=(\S*))?"
)
_ROWS = re.compile(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*")
_FORM = "write OUTxIN, e.g. 4096x4096, 4096x4096+bias or 4096x4096 q_proj rows=1,16"


@dataclass(frozen=True, slots=True)
class ListedShapes:
    """Distinct shapes in the order of a list.

    Attributes:
        names: The names of each.
        rows: The m of the shapes that list their own.
    """

    names: NamedShapes
    rows: Mapping[LinearShape, tuple[int, ...]]


def read_shapes(path: str | os.PathLike[str], dtype: str) -> ListedShapes:
    """Read a file of shapes; see `parse_shapes`.

    Raises:
        WorkloadError: It cannot be read, has a line of another form, or no shape.
    """
    try:
        text = read_text(Path(path))
    except OSError as error:
        raise WorkloadError(
            f"cannot read shapes from {path}: {error.strerror or error}{did_you_mean_path(path)};"
            " give a text file with one linear a line, e.g. 4096x4096"
        ) from error
    except ValueError as error:
        raise WorkloadError(
            f"{path} is no text ({first_line(error)}): {_FORM}, one linear a line"
        ) from error
    return parse_shapes(text.splitlines(), dtype, origin=str(path))


def parse_shapes(lines: Sequence[str], dtype: str, origin: str = "shapes") -> ListedShapes:
    """Read a list of shapes.

    Args:
        lines: Each is `NxK` (out features first), then `+bias` if it has one, a name if wanted, and
            `rows=1,16` if it is timed at other rows than the rest. Blank lines, and what follows
            `#`, are ignored.
        dtype: Dtype of weights and activations, e.g. `bfloat16`.
        origin: The name of the lines in errors.

    Raises:
        WorkloadError: A line has another form, or there is no shape.
    """
    found: NamedShapes = {}
    own_rows: dict[LinearShape, tuple[int, ...]] = {}
    for number, line in enumerate(lines, start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None:
            raise WorkloadError(f"{origin}, line {number}: cannot read {content[:60]!r}; {_FORM}")
        n, k, bias, name, rows = match.groups()
        shape = LinearShape(n=int(n), k=int(k), bias=bias is not None, dtype=dtype)
        names = found.get(shape, ())
        found[shape] = names if name is None or name in names else (*names, name)
        if rows is not None:
            before = own_rows.get(shape, ())
            own_rows[shape] = tuple(sorted({*before, *parse_rows(rows)}))
    if not found:
        raise WorkloadError(f"{origin} holds no shape: {_FORM}, one linear a line")
    return ListedShapes(found, own_rows)


def parse_rows(text: str) -> tuple[int, ...]:
    """Read `1,16,2048` as the m to time, each once, smallest first.

    Raises:
        WorkloadError: It has another form.
    """
    compact = text.replace(" ", "")
    if not _ROWS.fullmatch(compact):
        raise WorkloadError(
            f"cannot read rows {text!r}: write how many rows the activation has, e.g. 1,16,2048"
        )
    return tuple(sorted({int(part) for part in compact.split(",")}))
