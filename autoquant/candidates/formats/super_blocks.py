"""6-bit weights with small scales: groups of 16, whose scales are multiples of one for 256.

A scale takes 8 bits and its step 16, so a weight takes 6.5625: less than integers of 8 bits, and
nearly as exact. That is what llama.cpp calls Q6_K (`block_q6_K` in its `ggml-common.h`). No kernel
here multiplies them faster than the dequantized weight, so a search tries them only by name, or for
an engine that holds them.
"""

from __future__ import annotations

from typing import cast

import torch
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import Format, by_name_only
from autoquant.candidates.formats.low_bit import UNPACKING, bit_planes, integers_of
from autoquant.candidates.formats.rounding import Grid, nearest
from autoquant.candidates.neutral import NeutralWeight
from autoquant.records import LinearShape

_GRID = Grid(bits=6, group=16, symmetric=True)
_BLOCK = 256
_SMALLEST_STEP = 2.0**-24  # of float16
_LARGEST_SCALE = 127


class SuperBlockTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """6-bit weights `[n, k]`: (integer - 32) * scale * step.

    Tensor attributes:
        planes: uint8 `[6, n, k / 8]`, as in `BitPlaneTensor`.
        scale: int8 `[n, k / 16]`.
        step: float16 `[n, k / 256]`.
    """

    tensor_data_names = ["planes", "scale", "step"]  # noqa: RUF012
    tensor_attribute_names = ["shown"]  # noqa: RUF012

    def __new__(
        cls, planes: torch.Tensor, scale: torch.Tensor, step: torch.Tensor, shown: torch.dtype
    ) -> SuperBlockTensor:
        shape = (planes.shape[1], planes.shape[2] * 8)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=shown, device=planes.device, requires_grad=False
        )

    def __init__(
        self, planes: torch.Tensor, scale: torch.Tensor, step: torch.Tensor, shown: torch.dtype
    ) -> None:
        super().__init__()
        self.planes = planes
        self.scale = scale
        self.step = step
        self.shown = shown

    @classmethod
    def round(cls, weight: torch.Tensor) -> SuperBlockTensor:
        """Round a weight `[n, k]` to nearest, by the scales of each group's least squared error."""
        n, k = weight.shape
        wanted = nearest(weight, _GRID).scale.float().reshape(n, k // _BLOCK, -1)
        step = (wanted.amax(-1) / _LARGEST_SCALE).clamp(min=_SMALLEST_STEP).to(torch.float16)
        scale = (wanted / step.float().unsqueeze(-1)).round().clamp(1, _LARGEST_SCALE)
        each = (scale * step.float().unsqueeze(-1)).reshape(n, -1, 1)
        q = _GRID.integers(weight.float().reshape(n, -1, _GRID.group), each, torch.zeros_like(each))
        planes = bit_planes((q + _GRID.half).to(torch.uint8).reshape(n, k), _GRID.bits)
        return cls(planes, scale.to(torch.int8).reshape(n, -1), step, weight.dtype)

    def integers(self) -> torch.Tensor:
        """Return int8 `[n, k]` from -32."""
        return integers_of(self.planes).to(torch.int8) - _GRID.half

    def scales(self) -> torch.Tensor:
        """Return float32 `[n, k / 16]`: the scales times their steps, exactly."""
        steps = self.step.float().repeat_interleave(_BLOCK // _GRID.group, dim=1)
        return self.scale.float() * steps

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers `[n, k]`."""
        n, k = self.shape
        groups = self.integers().to(dtype).reshape(n, -1, _GRID.group)
        weight: torch.Tensor = groups * self.scales().to(dtype).unsqueeze(-1)
        return weight.reshape(n, k)


def _neutral(stored: torch.Tensor) -> NeutralWeight:
    weight = cast(SuperBlockTensor, stored)
    return NeutralWeight(
        codes=weight.integers(),
        bits=_GRID.bits,
        scale=weight.scales(),
        group=_GRID.group,
        low=-_GRID.half,
        scale_step=weight.step,
    )


def _unsupported(shape: LinearShape, _m: int, _device_type: str) -> str | None:
    return f"k={shape.k} is not divisible by {_BLOCK}" if shape.k % _BLOCK else None


FORMATS = (
    Format(
        id="int6s-g16/super-blocks",
        quantize=SuperBlockTensor.round,
        dequantize=lambda stored: cast(SuperBlockTensor, stored).unpack(torch.float32),
        neutral=_neutral,
        tensor_type=SuperBlockTensor,
        unsupported=_unsupported,
        by_default=by_name_only,
        kernels=(UNPACKING,),
        description=(
            "int6 weights, a symmetric scale of 8 bits for every 16 along k, a multiple of one of"
            " 16 bits for every 256; no fast kernel"
        ),
    ),
)

torch.serialization.add_safe_globals([SuperBlockTensor])
