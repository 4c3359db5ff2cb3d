"""int8 weights with one scale a row, in torchao's `Int8Tensor`, and their kernels.

The scale is rounded to the model's dtype before it divides the weight. So kernels with a 16-bit
scale use exactly the numbers of the float32 ones.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torchao.quantization import Int8Tensor, PerRow
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

from autoquant.candidates.base import A8_ROW, A16, Format, Kernel, round_row_int8
from autoquant.candidates.kernels.cpu_rows import cpu_rows_kernel, cpu_tiles_kernel, empty_rows
from autoquant.candidates.kernels.cpu_source import cpu_operator
from autoquant.candidates.kernels.gemlite import gemlite_kernels, gemlite_unsupported
from autoquant.candidates.neutral import NeutralWeight
from autoquant.records import LinearShape


def _quantize(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    scale = (weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127).to(weight.dtype)
    scale = scale.clamp(min=torch.finfo(weight.dtype).tiny)
    return cast(torch.Tensor, Int8Tensor.from_hp(weight, PerRow(), scale=scale, zero_point=None))


def _drop_zero_point(stored: torch.Tensor) -> torch.Tensor:
    """Drop the zero points, which torchao stores for symmetric weights and no kernel here reads."""
    values: Any = stored
    bare = Int8Tensor(values.qdata, values.scale, values.block_size, values.dtype)
    return cast(torch.Tensor, bare)


def _dequantize(stored: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, stored.qdata.float() * stored.scale.float())  # type: ignore[attr-defined]


def _lookup(stored: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    values, scale = _parts(stored)
    return values[rows].float() * scale[rows].float()


def _neutral(stored: torch.Tensor) -> NeutralWeight:
    values, scale = _parts(stored)
    return NeutralWeight(codes=values, bits=8, scale=scale, group=values.shape[1], low=-128)


def _parts(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 values `[n, k]` and scales `[n, 1]`."""
    return weight.qdata, weight.scale  # type: ignore[attr-defined]


def _torchao_dynamic(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    values, scale = _parts(weight)
    dynamic = Int8Tensor(
        values,
        scale,
        [1, values.shape[1]],
        weight.dtype,
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(PerRow()),
    )
    return F.linear(x, dynamic, bias)


def _packed_mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    values, scale = _parts(weight)
    y = torch._weight_int8pack_mm(
        x.reshape(-1, x.shape[-1]).contiguous(), values, scale.reshape(-1)
    )
    y = y.reshape(*x.shape[:-1], values.shape[0])
    return y if bias is None else y + bias


def _int_mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    values, scale = _parts(weight)
    rows = x.reshape(-1, x.shape[-1])
    rounded, x_scale = round_row_int8(rows)
    # Scaled in float32, since bfloat16 would round the sums first.
    y = torch._int_mm(rounded, values.t()).float()
    y = y * x_scale * scale.reshape(1, -1).float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], values.shape[0])


def _dequantize_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    values, scale = _parts(weight)
    return F.linear(x, (values.to(x.dtype) * scale), bias)


_PICKY_INT_MM = ("cuda",)
"""Kinds of device whose `_int_mm` takes some shapes only."""


def _packs(n: int, k: int) -> bool:
    """Check that `_packed_mm` takes a weight `[n, k]`.

    Others crash or give garbage in 16-bit floats.
    """
    return n % 4 == 0 and k % 16 == 0


def _packed_mm_unsupported(shape: LinearShape, _m: int, device_type: str) -> str | None:
    if device_type != "cpu":
        return "_weight_int8pack_mm is a CPU kernel here"
    if not _packs(shape.n, shape.k):
        return f"_weight_int8pack_mm needs n divisible by 4 and k by 16, not {shape.n}x{shape.k}"
    return None


def int_mm_unsupported(shape: LinearShape, m: int, device_type: str) -> str | None:
    """Return why `torch._int_mm` cannot compute `shape` at m rows on a device, or None."""
    if device_type not in _PICKY_INT_MM:
        return None
    if m <= 16:
        return f"_int_mm needs more than 16 rows on CUDA, not {m}"
    if shape.n % 8 or shape.k % 8:
        return f"_int_mm needs n and k divisible by 8 on CUDA, not {shape.n}x{shape.k}"
    return None


def _dynamic_unsupported(shape: LinearShape, m: int, device_type: str) -> str | None:
    if device_type == "cpu":
        # For one row, compiled code of PyTorch 2.13 even returns garbage.
        return "int-mm makes the same product on a CPU, and rounds less"
    return int_mm_unsupported(shape, m, device_type)


int8_rows = cpu_operator(
    "cpu_int8_rows", "Tensor x, Tensor weight, Tensor scale, Tensor? bias", empty_rows
)
"""Takes x `[..., k]`, int8 `[n, k]`, scales `[n, 1]` in x's dtype and a bias: a few rows."""


def _cpu_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return int8_rows(x, *_parts(weight), bias)


_int8_tiles = cpu_operator(
    "cpu_int8_tiles", "Tensor x, Tensor weight, Tensor scale, Tensor? bias", empty_rows
)


def _cpu_tiles(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _int8_tiles(x, *_parts(weight), bias)


def _library_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    return (_packed_mm if _packs(n, k) else _dequantize_matmul)(x, weight, bias)


FORMATS = (
    Format(
        id="int8-row/plain",
        quantize=lambda weight: _drop_zero_point(_quantize(weight)),
        dequantize=_dequantize,
        neutral=_neutral,
        tensor_type=Int8Tensor,
        joins=True,
        lookup=_lookup,
        kernels=(
            cpu_rows_kernel(_cpu_rows, _library_rows),
            cpu_tiles_kernel(_cpu_tiles, _dequantize_matmul),
            Kernel(
                id="int8pack-mm",
                numerics=A16,
                linear=_packed_mm,
                unsupported=_packed_mm_unsupported,
                description=(
                    "ATen's int8 weight-only product, which compiled torchao code ends in too"
                ),
            ),
            Kernel(
                id="dequantize-matmul",
                numerics=A16,
                linear=_dequantize_matmul,
                materializes=True,
                description="dequantize the weight, then the float product",
            ),
            Kernel(
                id="int-mm",
                numerics=A8_ROW,
                linear=_int_mm,
                arithmetic="int8",
                unsupported=int_mm_unsupported,
                description=(
                    "activation rows rounded to int8, integer product, scales applied in float32"
                ),
            ),
            Kernel(
                id="dynamic",
                numerics=A8_ROW,
                linear=_torchao_dynamic,
                arithmetic="int8",
                by_name=True,  # torchao 0.18 fails on GPUs, and `int-mm` makes the same product
                unsupported=_dynamic_unsupported,
                description="torchao's int8 dynamic-activation product",
            ),
            *gemlite_kernels(
                _parts, rounds=A8_ROW, arithmetic="int8", unsupported=gemlite_unsupported
            ),
        ),
        description="int8 weights, one symmetric scale a row",
    ),
)
