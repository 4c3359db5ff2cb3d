"""Calls of linears, and the one hook that sees or replaces them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

LINEAR_FUNCTIONS = (F.linear, torch.ops.aten.linear.default)
"""The function that a module calls, and the operator that an exported program calls."""


def linear_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return activation, weight and bias of a call, however they were passed."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
    return given["input"], given["weight"], given.get("bias")


@dataclass(frozen=True, slots=True)
class LinearCall:
    """One call of a linear.

    Attributes:
        function: The function that was called, one of `LINEAR_FUNCTIONS`.
        x: The activation `[..., k]`.
        weight: `[n, k]`; compare it with a parameter by identity.
        bias: `[n]`, or None.
    """

    function: Callable[..., torch.Tensor]
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the function's result for another activation and weight."""
        return self.function(x, weight, self.bias)


class LinearHook(TorchFunctionMode):
    """While active (`with hook:`), sees every call of a linear once, before it is computed.

    A subclass overrides `on_linear`. Calls that it makes itself are not seen again.
    """

    def on_linear(self, call: LinearCall) -> torch.Tensor | None:
        """Return the result `[..., n]` to use instead, or None to let the call run unchanged."""

    def on_other(self, function: Any, arguments: Sequence[Any]) -> None:
        """Take note of a call of any other function, with all its arguments."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LINEAR_FUNCTIONS:
            replaced = self.on_linear(LinearCall(func, *linear_arguments(args, kwargs)))
            if replaced is not None:
                return replaced
        else:
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
