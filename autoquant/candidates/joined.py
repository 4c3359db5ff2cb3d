"""Store weights behind one another, so that linears with the same input are computed as one.

Each weight keeps its name; its tensors are row views of larger ones. Only `candidates.linears` uses
the larger ones. All other code sees ordinary weights.
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
    """The larger weight that a joined weight is a part of.

    Attributes:
        parts: The plain tensors of the whole.
        rebuild: How to rebuild the whole from them.
        start: The first row of the part.
    """

    parts: tuple[torch.Tensor, ...]
    rebuild: Rebuild
    start: int


def join(weights: Sequence[torch.Tensor]) -> list[RoutedWeight]:
    """Return the same weights, with their tensors adjacent in memory.

    Args:
        weights: `[n_i, k]`, of one format that `joins`, with one route.

    Raises:
        ValueError: They cannot be multiplied as one.
    """
    if reason := unjoinable(weights):
        raise ValueError(reason)
    flat = [flatten_tensor(weight) for weight in weights]
    # The first tensors of all weights, then their second ones, and so on.
    alike = zip(*(parts for parts, _ in flat), strict=True)
    wholes = [torch.cat(tensors) for tensors in alike]
    joined = []
    start = 0
    for weight, (_, rebuild) in zip(weights, flat, strict=True):
        rows = weight.shape[0]
        view = unflatten_tensor(rebuild, [whole.narrow(0, start, rows) for whole in wholes])
        assert isinstance(view, RoutedWeight)
        joined.append(view)
        start += rows
    return joined


def stack_rows(stored: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return one stored tensor with the rows of several of one format and size, in new memory.

    Args:
        stored: `[n, k]` each, whose tensors lie row by row.
    """
    flat = [flatten_tensor(each) for each in stored]
    whole = [torch.cat(parts) for parts in zip(*(parts for parts, _ in flat), strict=True)]
    rows = stored[0].shape[0]
    return unflatten_tensor(with_rows(flat[0][1], rows, rows * len(stored)), whole)


def unjoinable(weights: Sequence[torch.Tensor]) -> str:
    """Return why these weights cannot be multiplied as one, or "" if they can."""
    first = weights[0]
    if not isinstance(first, RoutedWeight) or not get_format(first.format_id).joins:
        return "the format's tensors do not lie row by row"
    kind = (first.format_id, first.route)
    for other in weights[1:]:
        if not isinstance(other, RoutedWeight) or (other.format_id, other.route) != kind:
            return "the weights have different formats or routes"
        if other.shape[1] != first.shape[1] or other.compute_dtype != first.compute_dtype:
            return "the weights have different widths or dtypes"
    return ""


def whole_of(weight: RoutedWeight) -> Whole | None:
    """Return the larger weight that a weight is a part of, or None if it is not joined."""
    parts, rebuild = flatten_tensor(weight)
    rows = weight.shape[0]
    if not all(part.dim() and len(part) == rows and part.is_contiguous() for part in parts):
        return None
    places = {_place(part) for part in parts}
    if len(places) != 1:
        return None
    start, total = places.pop()
    if total == rows:
        return None
    wholes = tuple(_all_rows(part, total) for part in parts)
    return Whole(wholes, with_rows(rebuild, rows, total), start)


def _place(part: torch.Tensor) -> tuple[int, int]:
    """Return the row of its memory at which a tensor begins, and how many rows that memory has."""
    row_bytes = part.nbytes // len(part)
    memory_bytes = part.untyped_storage().nbytes()
    return part.storage_offset() // part.stride(0), memory_bytes // row_bytes


def _all_rows(part: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a view of all rows of a tensor's memory."""
    shape = (rows, *part.shape[1:])
    return part.new_empty(0).set_(part.untyped_storage(), 0, shape, part.stride())


def with_rows(rebuild: Rebuild, rows: int, total: int) -> Rebuild:
    """Return instructions for `total` rows instead of `rows`."""
    if rebuild.kind is None or rebuild.size is None:
        return rebuild
    first, *others = rebuild.size
    size = torch.Size((total if first == rows else first, *others))
    inner = tuple(with_rows(inside, rows, total) for inside in rebuild.inner)
    return replace(rebuild, size=size, inner=inner)
