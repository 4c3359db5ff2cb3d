"""The project's own kernels for a single row, as operators that `torch.compile` leaves alone."""

from __future__ import annotations

import functools
from typing import Any

import torch

from autoquant.candidates.gpu import needs_cuda, needs_library
from autoquant.records import LinearShape


def gemv_unsupported(shape: LinearShape, m: int, device_type: str) -> str | None:
    """Why `gemv_int4` cannot compute `shape` here."""
    if m != 1:
        return f"this kernel is for one row, not {m}"
    return needs_cuda(device_type, "this kernel") or needs_library("triton", "triton")


@torch.library.custom_op("autoquant::gemv_int4", mutates_args=(), device_types="cuda")
def gemv_int4(
    x: torch.Tensor, words: torch.Tensor, scale_and_zero: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply one row with an int4 weight, accumulating in float32.

    Args:
        x: `[1, k]`, 16-bit.
        words: int32 `[n, k / 8]` as in `Int4ChunkedTensor`.
        scale_and_zero: bfloat16 `[n, k / group, 2]`.

    Returns:
        `[1, n]` in x's dtype.
    """
    n, k = words.shape[0], words.shape[1] * 8
    group = k // scale_and_zero.shape[1]
    y = torch.empty((1, n), dtype=x.dtype, device=x.device)
    rows, chunks, warps = 4, 32, 1
    _kernels().gemv_w4[(-(-n // rows),)](
        x.contiguous(),
        words,
        scale_and_zero.view(torch.int32),
        bias,
        y,
        n,
        k,
        GROUP=group,
        HAS_BIAS=bias is not None,
        EVEN_N=n % rows == 0,
        EVEN_K=(k // 32) % chunks == 0,
        BLOCK_N=rows,
        BLOCK_C=chunks,
        ASM=True,
        num_warps=warps,
    )
    return y


@gemv_int4.register_fake
def _(x: torch.Tensor, words: torch.Tensor, _scale_and_zero: torch.Tensor, _bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((1, words.shape[0]))


@functools.cache
def _kernels() -> Any:
    from autoquant.candidates import skinny_kernels  # needs triton

    return skinny_kernels
