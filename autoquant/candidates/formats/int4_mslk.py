"""int4 weights in groups along k in torchao's plain layout, for the kernel of mslk."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor

from autoquant.candidates.base import A16, Format, Kernel
from autoquant.candidates.formats.int4_rounding import GROUP_SIZES
from autoquant.candidates.formats.int4_tinygemm import (
    int4_unsupported,
    library_linear,
)
from autoquant.candidates.neutral import NeutralWeight
from autoquant.devices.gpu import needs_cuda, needs_library
from autoquant.records import LinearShape


def _neutral(stored: torch.Tensor) -> NeutralWeight:
    weight: Any = stored
    n, k = weight.shape
    low, high = weight.qdata & 15, (weight.qdata >> 4) & 15
    q = torch.stack((low, high), dim=-1).reshape(n, k).to(torch.int8)
    return NeutralWeight(
        codes=torch.where(q > 7, q - 16, q),
        bits=4,
        scale=weight.scale.t(),
        group=k // weight.scale.shape[0],
        low=-8,
        zero=weight.zero_point.t(),
    )


def _mslk_unsupported(shape: LinearShape, m: int, device_type: str, *, group: int) -> str | None:
    return (
        int4_unsupported(shape, m, device_type, group=group)
        or needs_cuda(device_type, "mslk", (9, 0))
        or needs_library("mslk", "mslk-cuda")
    )


def _mslk(group: int) -> Format:
    return Format(
        id=f"int4-g{group}/mslk",
        quantize=lambda weight: cast(torch.Tensor, Int4Tensor.from_hp(weight.detach(), [1, group])),
        dequantize=lambda stored: _neutral(stored).dequantize(),
        neutral=_neutral,
        tensor_type=Int4Tensor,
        unsupported=functools.partial(_mslk_unsupported, group=group),
        kernels=(
            Kernel(
                id="mslk",
                numerics=A16,
                linear=library_linear,
                opaque=True,
                description="mslk's int4 weight-only product, through torchao",
            ),
        ),
        description=(
            f"int4 weights, scale and zero point for every {group} along k, in torchao's plain "
            "layout"
        ),
    )


FORMATS = tuple(map(_mslk, GROUP_SIZES))
