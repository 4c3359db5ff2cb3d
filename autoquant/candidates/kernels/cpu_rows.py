"""Products by the project's own CPU kernels, `rows.cpp` and `tiles.cpp`: the host's side."""

from __future__ import annotations

from typing import Any

import torch

from autoquant.candidates.base import A16, Kernel, LinearFunction
from autoquant.candidates.kernels.cpu_source import (
    cpu_kernels_work,
    cpu_source_unsupported,
    cpu_tiles_work,
    tiles_missing,
)
from autoquant.candidates.kernels.few_rows import too_many_rows
from autoquant.records import LinearShape


def empty_rows(x: torch.Tensor, weight: torch.Tensor, *_others: Any) -> torch.Tensor:
    """Return an empty product of x `[..., k]` with a weight of n rows: `[..., n]`."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def cpu_rows_kernel(own: LinearFunction, library: LinearFunction) -> Kernel:
    """Return a format's kernel `cpu-rows`.

    Args:
        own: Computes by an operator of `rows.cpp`. Its activation is contiguous.
        library: Stands in where a model is loaded on a machine that cannot compile `rows.cpp`.
    """

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return (own if cpu_kernels_work() else library)(x.contiguous(), weight, bias)

    return Kernel(
        id="cpu-rows",
        numerics=A16,
        linear=linear,
        unsupported=_rows_unsupported,
        description="the project's own product for a few rows, at the speed of memory",
    )


def cpu_tiles_kernel(own: LinearFunction, library: LinearFunction) -> Kernel:
    """Return a format's kernel `cpu-tiles`; as `cpu_rows_kernel`, by an operator of `tiles.cpp`."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return (own if cpu_tiles_work() else library)(x.contiguous(), weight, bias)

    return Kernel(
        id="cpu-tiles",
        numerics=A16,
        linear=linear,
        unsupported=_tiles_unsupported,
        description="the project's own product for many rows, by matrix instructions",
    )


def _rows_unsupported(shape: LinearShape, m: int, device_type: str) -> str | None:
    return cpu_source_unsupported(device_type, shape.dtype) or too_many_rows(shape, m, device_type)


def _tiles_unsupported(shape: LinearShape, _m: int, device_type: str) -> str | None:
    if reason := cpu_source_unsupported(device_type, shape.dtype) or tiles_missing():
        return reason
    return None if shape.dtype == "bfloat16" else f"it takes bfloat16, not {shape.dtype}"
