"""int4 weights in groups along k, in torchao's `Int4OpaqueTensor`, for ATen's CPU kernel.

The packing is opaque to torchao. It is that of `weight_to_int4pack_kernel` in PyTorch's
`aten/src/ATen/native/cpu/int4mm_kernel.cpp`. Rows form blocks (64 with AVX512, 32 with AVX2).
Inside a block, the bytes of one column k lie together: the low nibbles hold the first half of the
rows, and the high nibbles the second. Unpacking gives the second kernel of a route: dequantize,
then multiply in floating point.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

from autoquant.candidates.base import A16, Format, Kernel
from autoquant.candidates.formats.int4_rounding import ASYMMETRIC, with_roundings
from autoquant.candidates.formats.rounding import Rounded
from autoquant.candidates.kernels.cpu_source import load_cpu_kernels
from autoquant.candidates.neutral import NeutralWeight
from autoquant.records import LinearShape

_ROWS_PER_BLOCK = {"AVX512": 64, "AVX2": 32}


def rows_per_block() -> int | None:
    """Return the rows that ATen packs together on this CPU, or None if that is unknown."""
    return _ROWS_PER_BLOCK.get(torch.backends.cpu.get_cpu_capability())


def unpack_int4(qdata: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Undo ATen's CPU packing.

    Args:
        qdata: uint8 `[n, k / 2]` as `_convert_weight_to_int4pack_for_cpu` gives it.

    Returns:
        uint8 `[k, n]` of values 0 to 15 (the transposed weight).
    """
    block = rows_per_block() or n
    bytes_ = qdata.reshape(n // block, k, block // 2)
    values = torch.cat((bytes_ & 15, bytes_ >> 4), dim=-1)
    return values.permute(1, 0, 2).reshape(k, n)


def _transposed_float(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the dequantized weight, transposed.

    It is `[k, n]` of (value - 8) * scale + zero, with scale and zero `[groups, n]`.
    """
    stored = cast(Int4OpaqueTensor, weight)
    n, k = stored.shape
    group = stored.block_size[1]
    values = unpack_int4(stored.qdata, n, k).reshape(k // group, group, n)
    scale, zero = stored.scale_and_zero.to(dtype).unbind(-1)
    weights: torch.Tensor = (values.to(dtype) - 8) * scale.unsqueeze(1) + zero.unsqueeze(1)
    return weights.reshape(k, n)


def _quantize(weight: torch.Tensor, group: int) -> torch.Tensor:
    return cast(torch.Tensor, Int4OpaqueTensor.from_hp(weight.detach(), [1, group]))


def _pack(rounded: Rounded, group: int) -> torch.Tensor:
    """Pack integers as `Int4OpaqueTensor.from_hp` does."""
    packed = Int4OpaqueTensor(
        qdata=torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded.q + 8, 1),
        scale_and_zero=pack_tinygemm_scales_and_zeros(
            rounded.scale, rounded.zero, rounded.scale.dtype
        ),
        block_size=[1, group],
        shape=rounded.q.shape,
    )
    return cast(torch.Tensor, packed)


def _dequantize(stored: torch.Tensor) -> torch.Tensor:
    return _transposed_float(stored, torch.float32).t()


def _neutral(weight: torch.Tensor) -> NeutralWeight:
    stored = cast(Int4OpaqueTensor, weight)
    n, k = stored.shape
    scale, zero = stored.scale_and_zero.transpose(0, 1).unbind(-1)
    q = unpack_int4(stored.qdata, n, k).t().to(torch.int8) - 8
    return NeutralWeight(
        codes=q, bits=4, scale=scale, group=stored.block_size[1], low=-8, zero=zero
    )


def _packed_mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    stored = cast(Int4OpaqueTensor, weight)
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.reshape(-1, x.shape[-1]).contiguous(),
        stored.qdata,
        stored.block_size[1],
        stored.scale_and_zero,
    )
    y = y.reshape(*x.shape[:-1], stored.shape[0])
    return y if bias is None else y + bias


def _dequantize_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    # The weight is unpacked as [k, n], and a transposition would be a copy.
    y: torch.Tensor = rows @ _transposed_float(weight, x.dtype)
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _unsupported(shape: LinearShape, _m: int, device_type: str, *, group: int) -> str | None:
    if device_type != "cpu":
        return "ATen's int4 CPU packing is for CPUs"
    block = rows_per_block()
    if block is None:
        return "int4 packing needs a CPU with AVX2 or AVX512"
    if shape.k % group:
        return f"k={shape.k} is not divisible by the group size {group}"
    if shape.n % block:
        return f"n={shape.n} is not divisible by {block}, the rows that are packed together"
    return None


def _by_default(device_type: str) -> bool:
    """Leave this layout out where the project's own (`int4_lanes`), which is faster, works."""
    return device_type != "cpu" or load_cpu_kernels() is not None


def _format(group: int) -> Format:
    return Format(
        id=f"int4-g{group}/cpu-packed",
        quantize=functools.partial(_quantize, group=group),
        dequantize=_dequantize,
        neutral=_neutral,
        tensor_type=Int4OpaqueTensor,
        unsupported=functools.partial(_unsupported, group=group),
        by_default=_by_default,
        kernels=(
            Kernel(
                id="int4pack-mm",
                numerics=A16,
                linear=_packed_mm,
                # PyTorch 2.13 passes the group size as a constant, and mixes up constants of
                # nested regions.
                nests=False,
                description="ATen's int4 weight-only product",
            ),
            Kernel(
                id="dequantize-matmul",
                numerics=A16,
                linear=_dequantize_matmul,
                description="unpack and dequantize the weight, then the float product",
            ),
        ),
        description=f"int4 weights, scale and zero point for every {group} along k",
    )


FORMATS = tuple(
    fmt
    for grid in ASYMMETRIC
    for fmt in with_roundings(_format(grid.group), grid, functools.partial(_pack, group=grid.group))
)
