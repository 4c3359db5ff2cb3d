"""Emulate the numerics of a linear or a table in float32, without its kernel.

The weight is replaced by the numbers that a format stores, and the activation is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates.calls import LinearCall, LinearHook, LookupCall
from autoquant.models.streaming import stream_of


class EmulatedLinear(LinearHook):
    """While active, every linear on `parameter` uses `weight` and the rounded activation.

    Args:
        parameter: The model's own weight, recognized by identity.
        weight: What to multiply with instead, `[n, k]`.
        rounding: Applied to the activation.
    """

    def __init__(
        self,
        parameter: torch.Tensor,
        weight: torch.Tensor,
        rounding: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self._parameter = parameter
        self._weight = weight
        self._rounding = rounding

    def on_linear(self, call: LinearCall) -> torch.Tensor | None:
        if call.weight is not self._parameter:
            return None
        return call.compute(self._rounding(call.x), self._weight)


class EmulatedTable(LinearHook):
    """While active, every lookup in `parameter` reads `table` instead.

    Args:
        parameter: The model's own table, recognized by identity.
        table: `[n, k]`.
    """

    def __init__(self, parameter: torch.Tensor, table: torch.Tensor) -> None:
        super().__init__()
        self._parameter = parameter
        self._table = table

    def on_lookup(self, call: LookupCall) -> torch.Tensor | None:
        return F.embedding(call.ids, self._table) if call.table is self._parameter else None


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Hold the parameters of `module` in float32, and restore their dtypes afterwards.

    Widening and narrowing again gives the same bits. Parameters keep their identity, so tied ones
    stay tied. Buffers do not change: those that matter for precision are float32 already.
    """
    if (stream := stream_of(module)) is not None:
        with stream.in_float32():
            yield
        return
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
