"""Units: layers that get the same choice in every plan that is solved for. No torch.

A compiler compiles blocks that are alike once. If every layer chose for itself, nearly every block
would be of a make of its own. Each make takes seconds to compile for each phase, in a proof and at
a user's first request. So the layers of one role get the same choice in neighbouring blocks. First
and last blocks, which lose most, are apart from those between.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from autoquant.records import LayerChoice
from autoquant.solver.tied import counted_once

MAKES = 4
"""Blocks are of so many makes at most: the first, two halves of those between, the last."""
_END_SHARE = 8


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that get the same choice.

    Attributes:
        layers: Their positions.
        options: For each option, the choice that each of the layers gets.
    """

    layers: tuple[int, ...]
    options: tuple[tuple[LayerChoice, ...], ...]


def block_of(name: str) -> tuple[str, int] | None:
    """Return what comes before the first number in a name, and that number; None without one."""
    match = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", name)
    return (match[1] or "", int(match[2])) if match else None


def block_counts(names: Sequence[str]) -> dict[str, int]:
    """Return the number of blocks by what comes before their numbers."""
    counts: dict[str, int] = {}
    for prefix, number in filter(None, map(block_of, names)):
        counts[prefix] = max(counts.get(prefix, 0), number + 1)
    return counts


def ends_of(count: int) -> int:
    """Return how many of so many blocks are at each end: an eighth, and at least one."""
    return max(1, count // _END_SHARE)


def units_of(options: Sequence[Sequence[LayerChoice]]) -> list[Unit]:
    """Return the units of a model, in the order of their first layers.

    Args:
        options: By layer. Layers whose options differ (by a constraint, say) are in different
            units. A table and the layer it is tied to are in one, whose options are all pairs: what
            a pair takes is not the sum of what each takes.
    """
    counts = block_counts([layer[0].name for layer in options])
    groups: dict[Hashable, list[int]] = {}
    makes = [{_make(choice): choice for choice in reversed(layer)} for layer in options]
    names = {layer[0].name for layer in options}
    tables = [i for i, layer in enumerate(options) if layer[0].tied in names]
    for position, layer in enumerate(options):
        if position in tables:
            continue
        key = _group(layer[0].name, counts), frozenset(makes[position])
        groups.setdefault(key, []).append(position)
    units = [
        Unit(
            tuple(positions),
            tuple(
                tuple(makes[position][make] for position in positions)
                for make in dict.fromkeys(map(_make, options[positions[0]]))
            ),
        )
        for positions in groups.values()
    ]
    for position in tables:
        units = [_with_table(unit, position, options) for unit in units]
    return units


def _with_table(unit: Unit, position: int, options: Sequence[Sequence[LayerChoice]]) -> Unit:
    """Return the unit with a table that is tied to one of its layers; else as it is."""
    table = options[position]
    if not any(options[layer][0].name == table[0].tied for layer in unit.layers):
        return unit
    pairs = (counted_once([*option, own]) for option in unit.options for own in table)
    return Unit((*unit.layers, position), tuple(map(tuple, pairs)))


def _group(name: str, counts: dict[str, int]) -> Hashable:
    """Return what names a unit: the layer's name, with a part of the model for the block."""
    place = block_of(name)
    if place is None or counts[place[0]] <= MAKES:
        return name
    prefix, number = place
    rest = name.removeprefix(f"{prefix}." if prefix else "").partition(".")[2]
    return prefix, _part(number, counts[prefix]), rest


def _part(block: int, count: int) -> str:
    ends = ends_of(count)
    if block < ends:
        return "first"
    if block >= count - ends:
        return "last"
    return "lower" if 2 * block < count else "upper"


def _make(choice: LayerChoice) -> Hashable:
    """Return what a choice has in common with those of other blocks."""
    roles = tuple(name.rpartition(".")[2] for name in choice.joined)
    return choice.format, choice.numerics, choice.route, roles
