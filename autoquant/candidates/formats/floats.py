"""Unquantized weights: in the model's dtype, or cast to another float."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F

from autoquant.candidates.base import A16, Format, Kernel
from autoquant.candidates.calls import grouped_product
from autoquant.candidates.kernels.cpu_rows import cpu_rows_kernel, empty_rows
from autoquant.candidates.kernels.cpu_source import cpu_operator
from autoquant.candidates.neutral import NeutralWeight
from autoquant.records import LinearShape

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _cast_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute `F.linear` in the stored weight's dtype, and return it in x's."""
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _cast_grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return grouped_product(x.to(weight.dtype), weight, ends).to(x.dtype)


_bfloat16_rows = cpu_operator(
    "cpu_bfloat16_rows", "Tensor x, Tensor weight, Tensor? bias", empty_rows
)


def _cpu_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    bias = None if bias is None else bias.to(weight.dtype)
    return _bfloat16_rows(x.to(weight.dtype), weight, bias).to(x.dtype)


def _unsupported(shape: LinearShape, _m: int, _device_type: str, *, dtype: str) -> str | None:
    if FLOATS[dtype].itemsize > FLOATS[shape.dtype].itemsize:
        return f"{dtype} is wider than the model's {shape.dtype}: more memory and no better"
    return None


def _routed_unsupported(shape: LinearShape, m: int, device_type: str) -> str | None:
    if device_type != "cpu":
        return "only CPUs have a kernel for few rows of bfloat16"
    return _unsupported(shape, m, device_type, dtype="bfloat16")


def _by_default(device_type: str, *, dtype: str) -> bool:
    """Leave float16 out on CPUs, where bfloat16 is as small and its products are faster."""
    return dtype != "float16" or device_type != "cpu"


def _format(dtype: str) -> Format:
    torch_dtype = FLOATS[dtype]
    kernel = Kernel(
        id="matmul",
        numerics=A16,
        linear=_cast_linear,
        grouped=_cast_grouped,
        opaque=True,
        arithmetic=dtype,
        description="the library's matrix product",
    )
    return Format(
        id=f"{dtype}/plain",
        quantize=lambda weight: weight.detach().to(torch_dtype),
        dequantize=lambda stored: stored.float(),
        lookup=lambda stored, rows: stored[rows].float(),
        neutral=lambda stored: NeutralWeight(codes=stored, bits=8 * stored.itemsize),
        kernels=(kernel,),
        unsupported=functools.partial(_unsupported, dtype=dtype),
        by_default=functools.partial(_by_default, dtype=dtype),
        description=f"weights in {dtype}",
    )


def _routed_bfloat16() -> Format:
    """Return weights in bfloat16 with kernels of their own for few rows and for many.

    An unquantized layer is a plain parameter, which has no route.
    """
    plain = _format("bfloat16")
    return replace(
        plain,
        id="bfloat16/routed",
        kernels=(cpu_rows_kernel(_cpu_rows, _cast_linear), *plain.kernels),
        unsupported=_routed_unsupported,
        joins=True,
        description="weights in bfloat16, with a kernel for few rows",
    )


FORMATS = (*map(_format, FLOATS), _routed_bfloat16())


def original_format(dtype: str) -> str:
    """Return the id of the format that leaves a weight of `dtype` unquantized."""
    return f"{dtype}/plain"
