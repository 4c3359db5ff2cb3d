"""int4 weights in groups along k for GPUs in torchao's tinygemm packing.

Helpers that other int4 layouts for GPUs share are here, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor import (
    Int4TilePackedTo4dTensor,
)
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

from autoquant.candidates.base import A16, Format, Kernel
from autoquant.candidates.formats.int4_rounding import ASYMMETRIC, with_roundings
from autoquant.candidates.formats.rounding import Rounded
from autoquant.candidates.neutral import NeutralWeight
from autoquant.devices.gpu import needs_cuda
from autoquant.records import LinearShape

_TILE_ROWS, _TILE_COLUMNS = 8, 1024
ToFloat = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
"""Maps a stored weight to its numbers `[n, k]` in a dtype."""


def int4_unsupported(shape: LinearShape, m: int, device_type: str, *, group: int) -> str | None:
    """Return why no int4 layout for GPUs works for `shape` here, or None."""
    if reason := needs_cuda(device_type, "this int4 layout"):
        return reason
    if shape.dtype != "bfloat16":
        return f"int4 kernels take bfloat16 activations, not {shape.dtype}"
    return f"k={shape.k} is not divisible by the group size {group}" if shape.k % group else None


def library_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply with the kernel that torchao chooses for the stored tensor."""
    return F.linear(x, weight, bias)


def _tinygemm_float(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the dequantized weight `[n, k]`."""
    q, scale, zero = _unpacked(weight)
    n, k = q.shape
    q = q.reshape(n, scale.shape[1], -1).to(dtype)
    numbers = (q - 8) * scale.to(dtype).unsqueeze(-1) + zero.to(dtype).unsqueeze(-1)
    return numbers.reshape(n, k)


def _neutral(weight: torch.Tensor) -> NeutralWeight:
    q, scale, zero = _unpacked(weight)
    group = q.shape[1] // scale.shape[1]
    q = q.to(torch.int8) - 8
    return NeutralWeight(codes=q, bits=4, scale=scale, group=group, low=-8, zero=zero)


def _unpacked(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return int32 `[n, k]` from 0 to 15, scale and zero `[n, k / group]`.

    The packing is that of `matrix_to_m16n8k16_Bint4_layout` in PyTorch's
    `aten/src/ATen/native/cuda/int4mm.cu`: words `[n / 8, k / 128, 32, 4]`. Lane 4 * a + b holds row
    a. Nibble (odd, i, h) of its word j, lowest first, is column
    32 * j + 16 * i + 8 * h + 2 * b + odd.
    """
    stored: Any = weight
    n, k = stored.shape
    words = stored.qdata
    tiles_n, tiles_k = words.shape[:2]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device).reshape(2, 2, 2)
    q = (words.reshape(tiles_n, tiles_k, 8, 4, 4, 1, 1, 1) >> shifts) & 15
    q = q.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(tiles_n * 8, tiles_k * 128)[:n, :k]
    both = stored.scale_and_zero.transpose(0, 1)[:n, : k // stored.block_size[1]]
    scale, zero = both.unbind(-1)
    return q, scale, zero


def _pack_tinygemm(rounded: Rounded, group: int) -> torch.Tensor:
    """Pack integers as `Int4TilePackedTo4dTensor.from_hp` does, with k and n padded."""
    n, k = rounded.q.shape
    more_n, more_k = -n % _TILE_ROWS, -k % _TILE_COLUMNS
    q = F.pad(rounded.q + 8, (0, more_k, 0, more_n))
    scale, zero = (
        F.pad(part, (0, more_k // group, 0, more_n)) for part in (rounded.scale, rounded.zero)
    )
    packed = Int4TilePackedTo4dTensor(
        qdata=torch.ops.aten._convert_weight_to_int4pack(
            (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), 8
        ),
        scale_and_zero=pack_tinygemm_scales_and_zeros(scale, zero, scale.dtype),
        block_size=[1, group],
        shape=rounded.q.shape,
    )
    return cast(torch.Tensor, packed)


def _dequantize_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, to_float: ToFloat
) -> torch.Tensor:
    return F.linear(x, to_float(weight, x.dtype), bias)


def dequantize_kernel(to_float: ToFloat) -> Kernel:
    """Return the kernel that unpacks a weight by `to_float` and multiplies in floating point."""
    return Kernel(
        id="dequantize-matmul",
        numerics=A16,
        linear=functools.partial(_dequantize_matmul, to_float=to_float),
        materializes=True,
        description="unpack and dequantize the weight, then the float product",
    )


def _tinygemm(group: int) -> Format:
    return Format(
        id=f"int4-g{group}/tinygemm",
        quantize=lambda weight: cast(
            torch.Tensor, Int4TilePackedTo4dTensor.from_hp(weight.detach(), [1, group])
        ),
        dequantize=lambda stored: _tinygemm_float(stored, torch.float32),
        neutral=_neutral,
        tensor_type=Int4TilePackedTo4dTensor,
        unsupported=functools.partial(int4_unsupported, group=group),
        kernels=(
            Kernel(
                id="tinygemm",
                numerics=A16,
                linear=library_linear,
                opaque=True,
                description="ATen's int4 weight-only product, through torchao",
            ),
            dequantize_kernel(_tinygemm_float),
        ),
        description=(
            f"int4 weights, scale and zero point for every {group} along k, in tiles for tensor "
            "cores"
        ),
    )


FORMATS = tuple(
    fmt
    for grid in ASYMMETRIC
    for fmt in with_roundings(
        _tinygemm(grid.group), grid, functools.partial(_pack_tinygemm, group=grid.group)
    )
)
