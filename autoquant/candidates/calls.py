"""Calls of linears, experts and embeddings, and the one hook that sees or replaces them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

LINEAR_FUNCTIONS = (F.linear, torch.ops.aten.linear.default)
"""The function that a module calls, and the operator that an exported program calls."""
GROUPED_FUNCTIONS = (F.grouped_mm, torch._grouped_mm)
"""What a module with experts calls: each expert's rows times the expert's matrix."""
LOOKUP_FUNCTIONS = (F.embedding, torch.embedding, torch.ops.aten.embedding.default)
"""What looks up rows of a table: a module calls the first, an exported program the last."""
_GROUPED_NAMES = {"self": "input", "mat_a": "input", "mat2": "weight", "mat_b": "weight"}


def linear_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return activation, weight and bias of a call, however they were passed."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
    return given["input"], given["weight"], given.get("bias")


def grouped_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return x `[rows, k]`, weight `[experts, k, n]` and the row after the last of each expert.

    None if a call of `grouped_mm` computes something else.
    """
    named = {_GROUPED_NAMES.get(name, name): value for name, value in (kwargs or {}).items()}
    given = dict(zip(("input", "weight", "offs", "bias"), args, strict=False)) | named
    x, weight, ends = given["input"], given["weight"], given.get("offs")
    if ends is None or given.get("bias") is not None or given.get("out_dtype") is not None:
        return None
    return (x, weight, ends) if (x.ndim, weight.ndim) == (2, 3) else None


def expert_rows(ends: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield each expert that has rows, with its first row and the row after its last.

    Args:
        ends: `[experts]`, the row after the last of each.
    """
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, start, end
            start = end


def product(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x `[..., k]` times the transpose of a weight.

    Args:
        weight: `[n, k]`; for experts `[experts, n, k]`, with x `[rows, k]` sorted by expert.
        ends: The row after the last of each expert, or None for a linear.
    """
    return F.linear(x, weight) if ends is None else _by_expert(F.linear, x, weight, ends)


def grouped_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return x `[rows, k]`, sorted by expert, times each one's `[n, k]` of `[experts * n, k]`."""
    each = weight.view(len(ends), -1, weight.shape[1])
    return F.grouped_mm(x, each.transpose(-2, -1), offs=ends)


def product_back(
    gradient: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the gradient of x, from that of `product(x, weight, ends)`."""
    return gradient @ weight if ends is None else _by_expert(torch.matmul, gradient, weight, ends)


def _by_expert(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Compute with each expert's rows and matrix. Rows of no expert give zeros."""
    results = [compute(x[start:end], weight[expert]) for expert, start, end in expert_rows(ends)]
    results = results or [compute(x[:0], weight[0])]
    left = len(x) - sum(map(len, results))
    return torch.cat([*results, results[0].new_zeros(left, results[0].shape[1])])


@dataclass(frozen=True, slots=True)
class LinearCall:
    """One call of a linear, or of the experts of a layer.

    Attributes:
        function: The function that was called, one of `LINEAR_FUNCTIONS` or `GROUPED_FUNCTIONS`.
        x: The activation `[..., k]`; of experts `[rows, k]`, sorted by expert.
        weight: `[n, k]`; compare it with a parameter by identity. Of experts `[experts, n, k]`, or
            `[experts, k, n]` if they are `turned`.
        bias: `[n]`, or None.
        ends: The row after the last of each expert, or None for a linear.
        turned: The weight of the experts is kept the other way round.
    """

    function: Callable[..., torch.Tensor]
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    ends: torch.Tensor | None = None
    turned: bool = False

    def straight(self) -> torch.Tensor:
        """Return the weight as `[n, k]` or `[experts, n, k]`."""
        return self.weight.transpose(-2, -1) if self.turned else self.weight

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the function's result for another activation, and a weight that is not turned."""
        if self.ends is None:
            return self.function(x, weight, self.bias)
        return self.function(x, weight.transpose(-2, -1), offs=self.ends)


@dataclass(frozen=True, slots=True)
class LookupCall:
    """One lookup of rows in a table.

    Attributes:
        ids: Integers `[...]`, the rows.
        table: `[n, k]`; compare it with a parameter by identity.
        changes_table: The lookup also scales rows in place (`max_norm`).
    """

    ids: torch.Tensor
    table: torch.Tensor
    changes_table: bool = False


def lookup_call(function: Any, args: Sequence[Any], kwargs: Any) -> LookupCall | None:
    """Return the call of a lookup, however it was passed, or None for another function."""
    if function not in LOOKUP_FUNCTIONS:
        return None
    names: tuple[str, ...]
    if function is F.embedding:
        names = ("input", "weight", "padding_idx", "max_norm")
    else:
        names = ("weight", "indices")
    given = dict(zip(names, args, strict=False)) | dict(kwargs or {})
    ids = given["input"] if "input" in given else given["indices"]
    return LookupCall(ids, given["weight"], given.get("max_norm") is not None)


def _linear_call(function: Any, args: Any, kwargs: Any) -> LinearCall | None:
    """Return the call of a linear or of experts, or None if a function computes neither."""
    if function in LINEAR_FUNCTIONS:
        return LinearCall(function, *linear_arguments(args, kwargs))
    given = grouped_arguments(args, kwargs) if function in GROUPED_FUNCTIONS else None
    if given is None:
        return None
    x, weight, ends = given
    whole = whole_weight(weight)
    turned = whole is None
    return LinearCall(function, x, weight if whole is None else whole, None, ends, turned)


def whole_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor that a weight of experts is the whole transpose of, or None."""
    kept: torch.Tensor | None = getattr(weight, "untransposed", None)
    if kept is not None or weight._base is None:
        return kept
    base = weight._base
    if base.ndim != weight.ndim:
        return None
    transposed = base.transpose(-2, -1)
    alike = (transposed.shape, transposed.stride()) == (weight.shape, weight.stride())
    return base if alike else None


class LinearHook(TorchFunctionMode):
    """While active (`with hook:`), sees every call of a linear once, before it is computed.

    A subclass overrides `on_linear`. Calls that it makes itself are not seen again. Lookups of
    rows are seen, too, and are other functions as well.
    """

    def on_linear(self, call: LinearCall) -> torch.Tensor | None:
        """Return the result `[..., n]` to use instead, or None to let the call run unchanged."""

    def on_lookup(self, call: LookupCall) -> torch.Tensor | None:
        """Return the rows `[..., k]` to use instead, or None to let the lookup run unchanged."""

    def on_other(self, function: Any, arguments: Sequence[Any]) -> None:
        """Take note of a call of any other function, with all its arguments."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (call := _linear_call(func, args, kwargs)) is not None:
            replaced = self.on_linear(call)
            if replaced is not None:
                return replaced
        else:
            if (lookup := lookup_call(func, args, kwargs)) is not None:
                replaced = self.on_lookup(lookup)
                if replaced is not None:
                    return replaced
            self.on_other(func, (*args, *kwargs.values()))
        return func(*args, **kwargs)


def is_plain_call(*tensors: torch.Tensor | None) -> bool:
    """Check that a call with these tensors is not traced, intercepted or differentiated.

    The project's operators may then be called directly, without PyTorch's dispatch. That saves
    20 us on the host, longer than most products take on a GPU.

    Args:
        tensors: The first one is the activation.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return False
    return type(tensors[0]) is torch.Tensor
