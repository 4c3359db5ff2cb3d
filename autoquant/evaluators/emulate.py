"""Numerics without kernels: a linear's weight replaced by other numbers and its activation rounded, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoquant.candidates.calls import LINEAR_FUNCTIONS, linear_arguments


class EmulatedLinear(TorchFunctionMode):
    """While active, every linear on `parameter` uses `weight` and the rounded activation.

    Args:
        parameter: The model's own weight, recognised by identity.
        weight: What to multiply with instead, `[n, k]`.
        rounding: Applied to the activation.
    """

    def __init__(
        self, parameter: torch.Tensor, weight: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self._parameter = parameter
        self._weight = weight
        self._rounding = rounding

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LINEAR_FUNCTIONS:
            x, weight, bias = linear_arguments(args, kwargs)
            if weight is self._parameter:
                return func(self._rounding(x), self._weight, bias)
        return func(*args, **(kwargs or {}))


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Hold `module`'s parameters in float32, tensor by tensor, and put them back as they were.

    Widening and narrowing again gives the same bits. Parameters keep their identity, so ties stay tied. Buffers are left
    alone: those that matter for precision are float32 already.
    """
    narrowed: list[tuple[nn.Parameter, torch.dtype]] = []
    try:
        for parameter in module.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                narrowed.append((parameter, parameter.dtype))
                parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in narrowed:
            parameter.data = parameter.data.to(dtype)
