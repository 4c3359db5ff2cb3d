"""Names of layers and shapes, in few words: `model.layers.0-27.mlp.down_proj` for 28 names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autoquant.records import LayerChoice, LinearShape

_Parts = tuple[str | tuple[int, ...], ...]
"""Parts of a name. Numbers are sorted tuples, so that groups can grow."""


def fold(names: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Group names that differ only in numbers, as (pattern, names), in order of appearance.

    A pattern stands for exactly its names: it implies none that is missing.
    """
    groups: dict[_Parts, list[str]] = {}
    for name in names:
        groups.setdefault(_split(name), []).append(name)
    for position in range(max((len(parts) for parts in groups), default=0)):
        groups = _merge(groups, position)
    return [
        (".".join(_written(part) for part in parts), tuple(members))
        for parts, members in groups.items()
    ]


def shape_words(shape: LinearShape, count: int = 1) -> str:
    """Return a shape in words: `3 layers of 4096 x 1024 + bias, bfloat16`."""
    many = f"{count} layers of " if count > 1 else ""
    return f"{many}{size_words(shape)}, {shape.dtype}"


def layer_words(layer: LayerChoice, count: int = 1) -> str:
    """Return a layer's shape in words, with its experts: `4096 x 1024 for 8 experts, bfloat16`."""
    if layer.experts == 1:
        return shape_words(layer.shape, count)
    many = f"{count} layers of " if count > 1 else ""
    return f"{many}{size_words(layer.shape)} for {layer.experts} experts, {layer.shape.dtype}"


def size_words(shape: LinearShape) -> str:
    """Return a shape without its dtype: `4096 x 1024 + bias`."""
    return f"{shape.n} x {shape.k}{' + bias' if shape.bias else ''}"


def number_ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as ranges: `0-27`, or `{0-3, 5, 7-9}` for several ranges."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return words[0] if len(words) == 1 else f"{{{', '.join(words)}}}"


def _split(name: str) -> _Parts:
    return tuple(map(_part, name.split(".")))


def _part(text: str) -> str | tuple[int, ...]:
    # A number that is written otherwise, such as 007, could not be written back.
    is_number = text.isdecimal() and str(int(text)) == text
    return (int(text),) if is_number else text


def _merge(groups: dict[_Parts, list[str]], position: int) -> dict[_Parts, list[str]]:
    """Join groups that differ only in the numbers at `position`."""
    alike: dict[_Parts, list[_Parts]] = {}
    for parts in groups:
        alike.setdefault(_without_number(parts, position), []).append(parts)
    return {
        _union(members, position): [name for parts in members for name in groups[parts]]
        for members in alike.values()
    }


def _without_number(parts: _Parts, position: int) -> _Parts:
    if position < len(parts) and isinstance(parts[position], tuple):
        return (*parts[:position], (), *parts[position + 1 :])
    return parts


def _union(members: Sequence[_Parts], position: int) -> _Parts:
    """Return the parts that groups share, with all their numbers at `position`."""
    first = members[0]
    numbers: set[int] = set()
    for parts in members:
        part = parts[position] if position < len(parts) else ""
        if not isinstance(part, str):
            numbers.update(part)
    if not numbers:
        return first
    return (*first[:position], tuple(sorted(numbers)), *first[position + 1 :])


def _written(part: str | tuple[int, ...]) -> str:
    return part if isinstance(part, str) else number_ranges(part)
