"""float8 (e4m3) weights in torchao's `Float8Tensor`, with a scale for each row or for all."""

from __future__ import annotations

import functools
from typing import cast

import torch
import torch.nn.functional as F
from torchao.quantization import Float8Tensor, PerRow, PerTensor
from torchao.quantization.quantize_.common import KernelPreference

from autoquant.candidates.base import (
    A8_FLOAT8_ROW,
    A8_FLOAT8_TENSOR,
    A16,
    Format,
    Kernel,
    round_float8,
)
from autoquant.candidates.calls import grouped_product, is_plain_call
from autoquant.candidates.kernels.cuda_source import cuda_source_unsupported
from autoquant.candidates.kernels.few_rows import rows_kernel, too_many_rows
from autoquant.candidates.kernels.float8_rows import (
    CHUNK_COLUMNS,
    float8_rows,
    multiply_float8_rows,
    multiply_float8_rows_of_experts,
)
from autoquant.candidates.kernels.gemlite import gemlite_kernels, gemlite_unsupported
from autoquant.candidates.neutral import NeutralWeight
from autoquant.devices.gpu import needs_cuda, not_divisible
from autoquant.records import LinearShape

_FLOAT8_CAPABILITY = (8, 9)


def _quantize(weight: torch.Tensor, *, per_row: bool) -> torch.Tensor:
    stored = Float8Tensor.from_hp(
        weight.detach(),
        float8_dtype=torch.float8_e4m3fn,
        granularity=PerRow() if per_row else PerTensor(),
        # AUTO would depend on what else is installed.
        kernel_preference=KernelPreference.TORCH,
    )
    empty = stored.scale.flatten() == 0  # rows of zeros, which torchao divides by zero
    stored.scale.view(-1)[empty] = 1
    stored.qdata.view(torch.uint8)[empty.expand(weight.shape[0])] = 0
    return cast(torch.Tensor, stored)


def _dequantize(stored: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, stored.qdata.float() * stored.scale.float())  # type: ignore[attr-defined]


def _neutral(stored: torch.Tensor) -> NeutralWeight:
    values, scale = _parts(stored)
    n, k = values.shape
    return NeutralWeight(codes=values, bits=8, scale=scale.reshape(-1, 1).expand(n, 1), group=k)


def _dequantize_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    values = weight.qdata.to(x.dtype) * weight.scale.to(x.dtype)  # type: ignore[attr-defined]
    return F.linear(x, values, bias)


def float8_product(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    per_row: bool = True,
) -> torch.Tensor:
    """Round x to float8 and multiply it by a float8 weight.

    Args:
        x: `[..., k]`.
        values: float8 `[n, k]`.
        scale: `[n, 1]` if `per_row`, else one number in any shape.
    """
    rounded, x_scale = round_float8(x.reshape(-1, x.shape[-1]), per_row=per_row)
    y = torch._scaled_mm(
        rounded,
        values.t(),
        scale_a=x_scale,
        scale_b=scale.t() if per_row else scale.reshape(()),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return y.reshape(*x.shape[:-1], values.shape[0])


def float8_grouped_product(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Round x to float8, row by row, and multiply it by float8 weights of experts.

    Args:
        x: `[rows, k]`, sorted by expert.
        values: float8 `[experts * n, k]`.
        scale: `[experts * n, 1]`.
        ends: int32 `[experts]`, the row after the last of each.
    """
    rounded, x_scale = round_float8(x, per_row=True)
    each = values.view(len(ends), -1, values.shape[1])
    return torch._scaled_grouped_mm(
        rounded,
        each.transpose(-2, -1),
        x_scale.flatten(),
        scale.view(len(ends), -1),
        offs=ends,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )


def _scaled_mm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, per_row: bool
) -> torch.Tensor:
    return float8_product(x, weight.qdata, weight.scale, bias, per_row=per_row)  # type: ignore[attr-defined]


def _rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    values, scale = _parts(weight)
    product = multiply_float8_rows if is_plain_call(x, bias) else float8_rows
    return product(x, values, scale, bias)


def _rows_of_experts(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return multiply_float8_rows_of_experts(x, *_parts(weight), ends)


def _scaled_grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return float8_grouped_product(x, *_parts(weight), ends)


def _dequantize_grouped_mm(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    values, scale = _parts(weight)
    return grouped_product(x, values.to(x.dtype) * scale.to(x.dtype), ends)


def _rows_unsupported(shape: LinearShape, m: int, device_type: str) -> str | None:
    if reason := cuda_source_unsupported(device_type, "the product of a few rows"):
        return reason
    if shape.dtype != "bfloat16":
        return f"it takes bfloat16 activations, not {shape.dtype}"
    if shape.n % 8 or shape.k % CHUNK_COLUMNS:
        return f"it needs n divisible by 8 and k by {CHUNK_COLUMNS}, not {shape.n}x{shape.k}"
    return too_many_rows(shape, m, device_type)


def _parts(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.qdata, weight.scale  # type: ignore[attr-defined]


def float8_product_unsupported(shape: LinearShape, _m: int, device_type: str) -> str | None:
    """Return why `float8_product` cannot compute `shape` here, or None."""
    if reason := not_divisible(shape.n, shape.k, 16, "a float8 product"):
        return reason
    if shape.dtype != "bfloat16":
        return f"float8 products give bfloat16, not {shape.dtype}"
    return needs_cuda(device_type, "a float8 product", _FLOAT8_CAPABILITY)


def _gemlite_float8_unsupported(shape: LinearShape, m: int, device_type: str) -> str | None:
    return gemlite_unsupported(shape, m, device_type) or needs_cuda(
        device_type, "gemlite with float8", _FLOAT8_CAPABILITY
    )


def _kernels(*, per_row: bool) -> tuple[Kernel, ...]:
    numerics = A8_FLOAT8_ROW if per_row else A8_FLOAT8_TENSOR
    scales = "its own scale for each row" if per_row else "one scale"
    return (
        Kernel(
            id="dequantize-matmul",
            numerics=A16,
            linear=_dequantize_matmul,
            grouped=_dequantize_grouped_mm if per_row else None,
            materializes=True,
            description="dequantize the weight, then the float product",
        ),
        Kernel(
            id="scaled-mm",
            numerics=numerics,
            linear=functools.partial(_scaled_mm, per_row=per_row),
            grouped=_scaled_grouped_mm if per_row else None,
            arithmetic="float8",
            unsupported=float8_product_unsupported,
            description=(
                f"activation rounded to float8 with {scales}, then torch._scaled_mm (as compiled "
                "torchao does)"
            ),
        ),
    )


def _by_default(device_type: str) -> bool:
    # No CPU multiplies float8. There int8 is as small and as exact, and its kernels are faster.
    return device_type != "cpu"


_ROW_KERNELS = (
    rows_kernel(_rows, _rows_unsupported, _rows_of_experts),
    # Tuning these takes long, and where they work, `rows` and `scaled-mm` are about as fast.
    *gemlite_kernels(
        _parts,
        rounds=A8_FLOAT8_ROW,
        arithmetic="float8",
        unsupported=_gemlite_float8_unsupported,
        by_name=True,
    ),
)

FORMATS = (
    Format(
        id="float8-row/plain",
        quantize=functools.partial(_quantize, per_row=True),
        dequantize=_dequantize,
        neutral=_neutral,
        tensor_type=Float8Tensor,
        joins=True,
        by_default=_by_default,
        kernels=(*_kernels(per_row=True), *_ROW_KERNELS),
        description="float8 e4m3 weights, one scale a row",
    ),
    Format(
        id="float8-tensor/plain",
        quantize=functools.partial(_quantize, per_row=False),
        dequantize=_dequantize,
        neutral=_neutral,
        tensor_type=Float8Tensor,
        by_default=_by_default,
        kernels=_kernels(per_row=False),
        description="float8 e4m3 weights, one scale in all",
    ),
)
