"""float8 (e4m3) weights with one scale a row, in torchao's `Float8Tensor`."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torchao.quantization import Float8Tensor, PerRow

from autoquant.candidates.base import A16, Format, Kernel


def _quantize(weight: torch.Tensor) -> torch.Tensor:
    stored = Float8Tensor.from_hp(weight.detach(), float8_dtype=torch.float8_e4m3fn, granularity=PerRow())
    empty = stored.scale.flatten() == 0  # rows of zeros, which torchao divides by zero
    stored.scale[empty] = 1
    stored.qdata.view(torch.uint8)[empty] = 0
    return cast(torch.Tensor, stored)


def _dequantize(stored: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, stored.qdata.float() * stored.scale.float())  # type: ignore[attr-defined]


def _dequantize_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    values = weight.qdata.to(x.dtype) * weight.scale.to(x.dtype)  # type: ignore[attr-defined]
    return F.linear(x, values, bias)


FORMATS = (
    Format(
        id="float8-row/plain",
        quantize=_quantize,
        dequantize=_dequantize,
        tensor_type=Float8Tensor,
        kernels=(
            Kernel(
                id="dequantize-matmul",
                numerics=A16,
                linear=_dequantize_matmul,
                description="dequantize the weight, then the float product",
            ),
        ),
        description="float8 e4m3 weights, one scale a row",
    ),
)
