"""int4 weights in groups along k for GPUs, in one layout for each library that computes with them.

All layouts hold the numbers of torchao's tinygemm rounding, w = (q - 8) * scale + zero with q from 0 to 15 and scale and zero
of 16 bits for each group, so they share one quality score.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _quantize_affine_tinygemm,
)
from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor
from torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor import Int4TilePackedTo4dTensor

from autoquant.candidates.base import A8_ROW, A16, Format, Kernel, round_row_int8
from autoquant.candidates.gemlite import gemlite_unsupported, linear_w4
from autoquant.candidates.gpu import needs_cuda, needs_library
from autoquant.candidates.int4 import GROUP_SIZES
from autoquant.candidates.int4_tensors import Int4ChunkedTensor, Int4GemliteTensor
from autoquant.candidates.skinny import gemv_int4, gemv_unsupported
from autoquant.records import LinearShape

_EYE_ROWS = 1024


def tinygemm_rounding(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight `[n, k]`: q int32 `[n, k]` from 0 to 15, scale and zero `[n, k / group]` in the weight's dtype."""
    n, k = weight.shape
    block = (1, group)
    scale, zero = _choose_qparams_affine_tinygemm(
        weight, MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-6, None, weight.dtype
    )
    q = _quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
    return q, scale.reshape(n, k // group), zero.reshape(n, k // group)


def _unsupported(shape: LinearShape, m: int, device_type: str, *, group: int) -> str | None:
    if reason := needs_cuda(device_type, "this int4 layout"):
        return reason
    if shape.dtype != "bfloat16":
        return f"int4 kernels take bfloat16 activations, not {shape.dtype}"
    return f"k={shape.k} is not divisible by the group size {group}" if shape.k % group else None


# -- chunked: the project's own ------------------------------------------------------------------------------------


def _chunked_float(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    stored = cast(Int4ChunkedTensor, weight)
    n, k = stored.shape
    scale, zero = stored.scale_and_zero.to(dtype).unbind(-1)
    q = stored.unpack().reshape(n, k // stored.group, stored.group)
    return ((q.to(dtype) - 8) * scale.unsqueeze(-1) + zero.unsqueeze(-1)).reshape(n, k)


def _chunked_gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    stored = cast(Int4ChunkedTensor, weight)
    y: torch.Tensor = gemv_int4(x.reshape(1, -1), stored.qdata, stored.scale_and_zero, bias)
    return y.reshape(*x.shape[:-1], stored.shape[0])


def _chunked_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, _chunked_float(weight, x.dtype), bias)


def _chunked_int_mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    values, scale = round_row_int8(_chunked_float(weight, x.dtype))
    rounded, x_scale = round_row_int8(x.reshape(-1, x.shape[-1]))
    y = torch._int_mm(rounded, values.t()).float() * x_scale * scale.t()
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], values.shape[0])


def _int_mm_unsupported(shape: LinearShape, m: int, _device_type: str) -> str | None:
    if m <= 16:
        return f"_int_mm needs more than 16 rows on CUDA, not {m}"
    return f"_int_mm needs n divisible by 8, not {shape.n}" if shape.n % 8 else None


def _chunked(group: int) -> Format:
    return Format(
        id=f"int4-g{group}/chunked",
        quantize=lambda weight: Int4ChunkedTensor.pack(*tinygemm_rounding(weight, group)),
        dequantize=lambda stored: _chunked_float(stored, torch.float32),
        tensor_type=Int4ChunkedTensor,
        unsupported=functools.partial(_unsupported, group=group),
        kernels=(
            Kernel(
                id="gemv",
                numerics=A16,
                linear=_chunked_gemv,
                opaque=True,
                unsupported=gemv_unsupported,
                description="this project's Triton kernel for a single row",
            ),
            Kernel(
                id="dequantize-matmul",
                numerics=A16,
                linear=_chunked_matmul,
                materializes=True,
                description="dequantize the weight, then the float product",
            ),
            Kernel(
                id="int-mm",
                numerics=A8_ROW,
                linear=_chunked_int_mm,
                arithmetic="int8",
                materializes=True,
                unsupported=_int_mm_unsupported,
                description="weight and activation rows rounded to int8, integer product",
            ),
        ),
        description=f"int4 weights, scale and zero point for every {group} along k, 32 weights in 16 bytes",
    )


# -- tinygemm ------------------------------------------------------------------------------------------------------


def _library_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight, bias)


def _tinygemm_float(stored: torch.Tensor) -> torch.Tensor:
    """What the kernel makes of the unit vectors: the packing is opaque, and these are the numbers it multiplies with."""
    k = stored.shape[1]
    columns = []
    for start in range(0, k, _EYE_ROWS):
        rows = torch.arange(start, min(start + _EYE_ROWS, k), device=stored.device)
        units = (rows.unsqueeze(1) == torch.arange(k, device=stored.device)).to(torch.bfloat16)
        columns.append(F.linear(units, stored).t())
    return torch.cat(columns, dim=1).float()


def _tinygemm(group: int) -> Format:
    return Format(
        id=f"int4-g{group}/tinygemm",
        quantize=lambda weight: cast(torch.Tensor, Int4TilePackedTo4dTensor.from_hp(weight.detach(), [1, group])),
        dequantize=_tinygemm_float,
        tensor_type=Int4TilePackedTo4dTensor,
        unsupported=functools.partial(_unsupported, group=group),
        kernels=(
            Kernel(
                id="tinygemm",
                numerics=A16,
                linear=_library_linear,
                opaque=True,
                description="ATen's int4 weight-only product, through torchao",
            ),
        ),
        description=f"int4 weights, scale and zero point for every {group} along k, in tiles for tensor cores",
    )


# -- gemlite -------------------------------------------------------------------------------------------------------


def _gemlite_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    stored = cast(Int4GemliteTensor, weight)
    return linear_w4(x, stored.qdata, stored.scale, stored.offset, bias)


def _gemlite_unsupported(shape: LinearShape, m: int, device_type: str, *, group: int) -> str | None:
    return _unsupported(shape, m, device_type, group=group) or gemlite_unsupported(shape, m, device_type)


def _gemlite(group: int) -> Format:
    return Format(
        id=f"int4-g{group}/gemlite",
        quantize=lambda weight: Int4GemliteTensor.pack(*tinygemm_rounding(weight, group)),
        dequantize=lambda stored: cast(Int4GemliteTensor, stored).unpacked_float(),
        tensor_type=Int4GemliteTensor,
        unsupported=functools.partial(_gemlite_unsupported, group=group),
        kernels=(
            Kernel(
                id="gemlite",
                numerics=A16,
                linear=_gemlite_linear,
                opaque=True,
                description="gemlite's weight-only product",
            ),
        ),
        description=f"int4 weights, scale and offset for every {group} along k, eight weights along k in a word",
    )


# -- mslk ----------------------------------------------------------------------------------------------------------


def _mslk_float(stored: torch.Tensor) -> torch.Tensor:
    weight: Any = stored
    n, k = weight.shape
    low, high = weight.qdata & 15, (weight.qdata >> 4) & 15
    q = torch.stack((low, high), dim=-1).reshape(n, k).float()
    q = torch.where(q > 7, q - 16, q).reshape(n, weight.scale.shape[0], -1)
    scale, zero = weight.scale.t().float().unsqueeze(-1), weight.zero_point.t().float().unsqueeze(-1)
    return cast(torch.Tensor, (q * scale + zero).reshape(n, k))


def _mslk_unsupported(shape: LinearShape, m: int, device_type: str, *, group: int) -> str | None:
    return (
        _unsupported(shape, m, device_type, group=group)
        or needs_cuda(device_type, "mslk", (9, 0))
        or needs_library("mslk", "mslk-cuda")
    )


def _mslk(group: int) -> Format:
    return Format(
        id=f"int4-g{group}/mslk",
        quantize=lambda weight: cast(torch.Tensor, Int4Tensor.from_hp(weight.detach(), [1, group])),
        dequantize=_mslk_float,
        tensor_type=Int4Tensor,
        unsupported=functools.partial(_mslk_unsupported, group=group),
        kernels=(
            Kernel(
                id="mslk",
                numerics=A16,
                linear=_library_linear,
                opaque=True,
                description="mslk's int4 weight-only product, through torchao",
            ),
        ),
        description=f"int4 weights, scale and zero point for every {group} along k, in torchao's plain layout",
    )


FORMATS = tuple(make(group) for make in (_chunked, _tinygemm, _gemlite, _mslk) for group in GROUP_SIZES)
