"""Weights of linears that read the same input, stored behind one another so that they can be multiplied as one.

Each stays a weight of its own, of its own name: its tensors are views of rows of larger ones. Whoever multiplies them may take
the larger ones instead (see `autoquant.runtime.compiled`); everybody else need not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from autoquant.candidates.flat import Rebuild, flatten_tensor, unflatten_tensor
from autoquant.candidates.registry import get_format
from autoquant.candidates.routed import RoutedWeight


@dataclass(frozen=True, slots=True)
class Whole:
    """What a weight is a part of.

    Attributes:
        parts: The plain tensors of the whole.
        rebuild: How to put the whole together.
        start: The weight's first row in it.
    """

    parts: tuple[torch.Tensor, ...]
    rebuild: Rebuild
    start: int


def join(weights: Sequence[torch.Tensor]) -> list[RoutedWeight]:
    """The same weights, whose tensors lie behind one another.

    Args:
        weights: `[n_i, k]`, of one format that `joins`, with one route.

    Raises:
        ValueError: They cannot be multiplied as one.
    """
    if reason := unjoinable(weights):
        raise ValueError(reason)
    flat = [flatten_tensor(weight) for weight in weights]
    wholes = [torch.cat(parts) for parts in zip(*(parts for parts, _ in flat), strict=True)]
    joined = []
    start = 0
    for weight, (parts, rebuild) in zip(weights, flat, strict=True):
        rows = weight.shape[0]
        views = [whole.narrow(0, start, len(part)) for whole, part in zip(wholes, parts, strict=True)]
        together = unflatten_tensor(rebuild, views)
        assert isinstance(together, RoutedWeight)
        joined.append(together)
        start += rows
    return joined


def unjoinable(weights: Sequence[torch.Tensor]) -> str:
    """Why these weights cannot be multiplied as one; empty where they can."""
    first = weights[0]
    if not isinstance(first, RoutedWeight) or not get_format(first.format_id).joins:
        return "the format's tensors do not lie row by row"
    for other in weights[1:]:
        if not isinstance(other, RoutedWeight) or other.format_id != first.format_id or other.route != first.route:
            return "the weights have different formats or routes"
        if other.shape[1] != first.shape[1] or other.compute_dtype != first.compute_dtype:
            return "the weights have different widths or dtypes"
    return ""


def whole_of(weight: RoutedWeight) -> Whole | None:
    """What the weight is a part of, or None where it stands for itself."""
    parts, rebuild = flatten_tensor(weight)
    rows = weight.shape[0]
    if not all(part.dim() and len(part) == rows and part.is_contiguous() for part in parts):
        return None
    placed = {_placed(part) for part in parts}
    if len(placed) != 1:
        return None
    start, total = placed.pop()
    if total == rows:
        return None
    wholes = tuple(
        part.new_empty(0).set_(part.untyped_storage(), 0, (total, *part.shape[1:]), part.stride()) for part in parts
    )
    return Whole(wholes, _with_rows(rebuild, rows, total), start)


def _placed(part: torch.Tensor) -> tuple[int, int]:
    """Row of its memory at which a tensor begins, and how many rows fit into that."""
    return part.storage_offset() // part.stride(0), part.untyped_storage().nbytes() // (part.nbytes // len(part))


def _with_rows(rebuild: Rebuild, rows: int, total: int) -> Rebuild:
    """The same make with another number of rows."""
    if rebuild.kind is None or rebuild.size is None:
        return rebuild
    size = torch.Size((total if rebuild.size[0] == rows else rebuild.size[0], *rebuild.size[1:]))
    return replace(rebuild, size=size, inner=tuple(_with_rows(inner, rows, total) for inner in rebuild.inner))
