"""Layers by type and block: row `self_attn.q_proj`, column `3` for `layers.3.self_attn.q_proj`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OUTSIDE = "-"
"""The column of layers outside all blocks, such as the head."""
_Type = tuple[tuple[str, ...], tuple[str, ...]]
"""Parts of a name before the block's number, and after it."""


@dataclass(frozen=True, slots=True)
class LayerGrid:
    """Layers by type and block.

    Attributes:
        rows: Types of layers, in the order of the model.
        columns: Blocks.
        places: (row, column) by layer name. Layers of a list within a block, such as experts,
            share a place.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    places: Mapping[str, tuple[int, int]]


def layer_grid(names: Iterable[str]) -> LayerGrid:
    """Return the grid. The first number in a name is its block, and later ones are ignored."""
    split = {name: _split(name) for name in names}
    types = list(dict.fromkeys(layer_type for layer_type, _ in split.values()))
    blocks: list[int | None] = [
        *sorted({block for _, block in split.values() if block is not None})
    ]
    if any(block is None for _, block in split.values()):
        blocks.append(None)
    places = {
        name: (types.index(layer_type), blocks.index(block))
        for name, (layer_type, block) in split.items()
    }
    columns = tuple(OUTSIDE if block is None else str(block) for block in blocks)
    return LayerGrid(tuple(_labels(types)), columns, places)


def _split(name: str) -> tuple[_Type, int | None]:
    """Return what stands before and after the number of the block, and that number."""
    parts = name.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        return (tuple(parts), ()), None
    at = numbers[0]
    before, block, after = parts[:at], parts[at], parts[at + 1 :]
    # The experts of a block, for instance, are of one type.
    rest = tuple("*" if part.isdecimal() else part for part in after)
    return (tuple(before), rest), int(block)


def _labels(types: list[_Type]) -> list[str]:
    """Return what follows the block's number, or the whole name if that is ambiguous."""
    short = [".".join(after or before) or "layer" for before, after in types]
    return [
        label if short.count(label) == 1 else ".".join([*before, "*", *after])
        for label, (before, after) in zip(short, types, strict=True)
    ]
