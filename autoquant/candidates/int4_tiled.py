"""int4 weights for the project's own CUDA kernels, which read such a weight in half the time of one of 8 bits.

Other libraries' int4 kernels spend more time on unpacking than on reading. Here weights lie as tensor cores want them, become
operands by two instructions for two weights, and scales are applied to sums (the layout and the arithmetic: `int4_tiled.cu`; the
idea of magic numbers is that of FasterTransformer and Marlin, Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive Parallel
Inference on Large Language Models", 2024). For many rows the weight is unpacked first, by a kernel of its own.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from autoquant.candidates.base import A16, W8_A8_FLOAT8_ROW, Format, Kernel
from autoquant.candidates.calls import is_plain_call
from autoquant.candidates.cuda_source import cuda_kernel, cuda_source_unsupported
from autoquant.candidates.few_rows import multiply_rows, rows_kernel, too_many_rows
from autoquant.candidates.float8 import float8_product, float8_product_unsupported
from autoquant.candidates.int4 import GROUP_SIZES
from autoquant.candidates.int4_gpu import tinygemm_rounding, with_roundings
from autoquant.candidates.int4_tiled_tensor import TILE_COLUMNS, TILE_ROWS, Int4TiledTensor
from autoquant.candidates.operators import define_operator
from autoquant.candidates.rounding import Rounded
from autoquant.records import LinearShape

_SOURCE = "int4_tiled.cu"
_UNPACKING_THREADS = 256
SETTINGS = (
    (1, (16, 1, 1), (16, 1, 2)),
    (2, (16, 1, 2), (16, 2, 1)),
    (4, (8, 1, 2), (8, 1, 3)),
    (32, (4, 1, 4), (4, 2, 3)),
    (0, (4, 4, 4), (4, 2, 3)),
)
"""See `Settings` of `few_rows`; on an H200 (`python studies/gpu_linears/own_kernels/int4_settings.py`)."""


def multiply_int4_rows(
    x: torch.Tensor, qdata: torch.Tensor, scale_and_zero: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x `[..., k]`, up to 16 rows in all, times an `Int4TiledTensor` `[n, k]`: `[..., n]`."""
    group = x.shape[-1] // scale_and_zero.shape[1]
    return multiply_rows(_SOURCE, "int4_rows", SETTINGS, x, (qdata, scale_and_zero), bias, (("GROUP", group),))


def _empty_rows(
    x: torch.Tensor, qdata: torch.Tensor, scale_and_zero: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], qdata.shape[0])


int4_rows = define_operator("int4_rows", multiply_int4_rows, _empty_rows)


def unpack_int4_tiles(
    qdata: torch.Tensor, scale_and_zero: torch.Tensor, row_scale: torch.Tensor, float8: bool
) -> torch.Tensor:
    """The `[n, k]` numbers of an `Int4TiledTensor`: bfloat16, or float8 of each over its row's scale."""
    n, k = qdata.shape[0], 8 * qdata.shape[1]
    tiles = n * k // (TILE_ROWS * TILE_COLUMNS)
    defines = (("GROUP", k // scale_and_zero.shape[1]), ("FLOAT8", int(float8)))
    kernel = cuda_kernel(_SOURCE, "int4_unpack", defines, qdata.device)
    out = qdata.new_empty(n, k, dtype=torch.float8_e4m3fn if float8 else torch.bfloat16)
    blocks = -(-tiles // (_UNPACKING_THREADS // 32))
    kernel.launch(blocks, _UNPACKING_THREADS, qdata, scale_and_zero, row_scale, out, tiles, k // TILE_COLUMNS)
    return out


def _empty_numbers(
    qdata: torch.Tensor, scale_and_zero: torch.Tensor, row_scale: torch.Tensor, float8: bool
) -> torch.Tensor:
    dtype = torch.float8_e4m3fn if float8 else torch.bfloat16
    return qdata.new_empty(qdata.shape[0], 8 * qdata.shape[1], dtype=dtype)


int4_unpack = define_operator("int4_unpack", unpack_int4_tiles, _empty_numbers)


def _rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    stored = cast(Int4TiledTensor, weight)
    product = multiply_int4_rows if is_plain_call(x, bias) else int4_rows
    return cast(torch.Tensor, product(x, stored.qdata, stored.scale_and_zero, bias))


def _unpacked(weight: torch.Tensor, *, float8: bool) -> torch.Tensor:
    stored = cast(Int4TiledTensor, weight)
    unpack = unpack_int4_tiles if is_plain_call(stored.qdata) else int4_unpack
    return cast(torch.Tensor, unpack(stored.qdata, stored.scale_and_zero, stored.row_scale, float8))


def _unpack_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, _unpacked(weight, float8=False), bias)


def _unpack_scaled_mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    row_scale = cast(Int4TiledTensor, weight).row_scale
    return float8_product(x, _unpacked(weight, float8=True), row_scale, bias)


def _unsupported(shape: LinearShape, _m: int, device_type: str) -> str | None:
    if reason := cuda_source_unsupported(device_type, "this int4 layout"):
        return reason
    if shape.dtype != "bfloat16":
        return f"int4 kernels take bfloat16 activations, not {shape.dtype}"
    if shape.n % TILE_ROWS or shape.k % TILE_COLUMNS:
        return f"tiles need n divisible by {TILE_ROWS} and k by {TILE_COLUMNS}, not {shape.n}x{shape.k}"
    return None


def _pack(rounded: Rounded) -> torch.Tensor:
    return Int4TiledTensor.pack(rounded.q + 8, rounded.scale, rounded.zero)


def _format(group: int) -> Format:
    return Format(
        id=f"int4-g{group}/tiled",
        quantize=lambda weight: Int4TiledTensor.pack(*tinygemm_rounding(weight, group)),
        dequantize=lambda stored: cast(Int4TiledTensor, stored).unpack(torch.float32),
        tensor_type=Int4TiledTensor,
        joins=True,
        unsupported=_unsupported,
        kernels=(
            rows_kernel(_rows, too_many_rows),
            Kernel(
                id="unpack-matmul",
                numerics=A16,
                linear=_unpack_matmul,
                materializes=True,
                description="the project's own unpacking, then the bfloat16 product",
            ),
            Kernel(
                id="unpack-scaled-mm",
                numerics=W8_A8_FLOAT8_ROW,
                linear=_unpack_scaled_mm,
                arithmetic="float8",
                materializes=True,
                unsupported=float8_product_unsupported,
                description="weight unpacked to float8, activation rows rounded to it, then torch._scaled_mm",
            ),
        ),
        description=f"int4 weights, scale and zero point for every {group} along k, as the project's kernels read them",
    )


FORMATS = tuple(fmt for group in GROUP_SIZES for fmt in with_roundings(_format(group), group, _pack))
