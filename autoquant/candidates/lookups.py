"""Look up rows of a quantized table: only those rows are dequantized.

A table is the weight of an embedding, a `RoutedWeight` in a format with a `lookup`. It may be a
linear's weight as well (a tied head): one stored tensor with two uses. As with linears, compiled
code sees the plain tensors inside, so that no call unwraps the table and a CUDA graph does not copy
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates.apart import Apart
from autoquant.candidates.base import LookupFunction
from autoquant.candidates.calls import LOOKUP_FUNCTIONS, lookup_call
from autoquant.candidates.flat import Rebuild, flatten_tensor, unflatten_tensor
from autoquant.candidates.registry import get_format
from autoquant.candidates.routed import RoutedWeight
from autoquant.errors import ModelError
from autoquant.records import LOOKUP, content_key

_CHECKED_ROWS = 64
_OPERATOR = torch.ops.aten.embedding.default


def look_up(weight: RoutedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Return rows `[..., k]` of a table, in the dtype that it shows.

    Args:
        weight: `[n, k]`.
        ids: Integers `[...]` below n.

    Raises:
        ModelError: The layout of the weight does not allow it.
    """
    numbers = _lookup_function(weight.format_id)(weight.stored, ids.reshape(-1))
    return numbers.to(weight.compute_dtype).reshape(*ids.shape, weight.shape[1])


_FUNCTIONS: dict[str, LookupFunction] = {}


def _lookup_function(format_id: str) -> LookupFunction:
    """Return a format's lookup. The compiler traces this, so it uses a plain dict."""
    if format_id not in _FUNCTIONS:
        found = get_format(format_id).lookup
        if found is None:
            raise ModelError(
                f"rows of {format_id} cannot be looked up: keep embeddings unquantized"
            )
        _FUNCTIONS[format_id] = found
    return _FUNCTIONS[format_id]


@RoutedWeight.implements([_OPERATOR])  # type: ignore[untyped-decorator]
@RoutedWeight.implements_torch_function(LOOKUP_FUNCTIONS)  # type: ignore[untyped-decorator]
def _embedding(func: Any, _types: Any, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor:
    call = lookup_call(func, args, kwargs)
    if call is None or not isinstance(call.table, RoutedWeight) or call.changes_table:
        raise ModelError("a quantized table can only be looked up, and not changed (max_norm)")
    return look_up(call.table, call.ids)


def is_table_alone(weight: RoutedWeight) -> bool:
    """Check whether a weight is a table, and no linear's weight as well."""
    return weight.route[0][1] == LOOKUP


def wrong_rows(weight: RoutedWeight) -> str:
    """Return what is wrong with lookups in a table, or an empty string.

    Rows at both ends and between are compared with the numbers that the table stores.
    """
    n = weight.shape[0]
    ids = torch.linspace(0, n - 1, min(n, _CHECKED_ROWS), device=weight.device).round().long()
    found = look_up(weight, ids).float()
    expected = weight.dequantize()[ids].to(weight.compute_dtype).float()
    if torch.allclose(found, expected, rtol=1e-2, atol=1e-6, equal_nan=True):
        return ""
    return f"rows that are looked up differ by {(found - expected).abs().max().item():.2g}"


class ApartEmbedding(Apart, nn.Embedding):
    """An embedding that looks up rows in the tensors inside its table."""

    found_again = ("_parts", "_looked_up")

    _parts: list[torch.Tensor]
    _looked_up: Callable[..., torch.Tensor]

    def take_apart(self) -> None:
        """Find the tensors inside the table."""
        weight = cast(RoutedWeight, self.weight.data)
        self._parts, rebuild = flatten_tensor(weight)
        for part in self._parts:
            torch._dynamo.mark_static_address(part)
        self._looked_up = _apart_lookup(rebuild)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self._looked_up(input, *self._parts)
        return F.embedding(input, self.weight)


class RoutedEmbedding(ApartEmbedding):
    """An `nn.Embedding` whose quantized table was taken apart."""


_classes: dict[type[nn.Embedding], type[ApartEmbedding]] = {nn.Embedding: RoutedEmbedding}


def take_embedding_apart(owner: nn.Module) -> None:
    """Make an embedding look up rows in the tensors inside its quantized table, in place.

    What a subclass does with the rows (scaling, say) stays as it is.
    """
    if not isinstance(owner, nn.Embedding) or not isinstance(owner.weight.data, RoutedWeight):
        return
    if not isinstance(owner, ApartEmbedding):
        kind = type(owner)
        if kind not in _classes:
            # Its own forward pass comes first, and calls that of `ApartEmbedding` as its parent's.
            named = {"__module__": kind.__module__}
            _classes[kind] = type(kind.__name__, (kind, ApartEmbedding), named)
        owner.__class__ = _classes[kind]
    cast(ApartEmbedding, owner).take_apart()


_LOOKUPS: dict[str, Callable[..., torch.Tensor]] = {}


def _apart_lookup(rebuild: Rebuild) -> Callable[..., torch.Tensor]:
    """Return the lookup in tables of one make.

    It takes ids and the plain tensors inside. As with the products of linears, the compiler's first
    stage does not look into it, and its name contains the make.
    """
    make = content_key([repr(rebuild)])
    if make not in _LOOKUPS:

        def lookup(ids: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
            return look_up(cast(RoutedWeight, unflatten_tensor(rebuild, list(parts))), ids)

        lookup.__name__ = lookup.__qualname__ = f"lookup_{make}"
        _LOOKUPS[make] = torch.compiler.allow_in_graph(lookup)  # type: ignore[no-untyped-call]
    return _LOOKUPS[make]
