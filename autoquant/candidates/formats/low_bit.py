"""Symmetric int3 and int2 weights in groups along k, for quality and memory only.

No kernel here multiplies them faster than the dequantized weight, so a search tries them only by
name. They are stored as bit planes, which waste no bits.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
import torch.nn.functional as F
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import A16, Format, Kernel, by_name_only
from autoquant.candidates.formats.rounding import Grid, Rounded, rounded_formats
from autoquant.candidates.neutral import NeutralWeight
from autoquant.records import LinearShape

CHOICES = ((3, 32), (3, 64), (2, 32))
_SMALLEST_SCALE = 1e-12


class BitPlaneTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """Integer weights `[n, k]` of few bits with a scale for each group along k.

    Tensor attributes:
        planes: uint8 `[bits, n, k / 8]`, the lowest bits first. Each byte holds one bit of eight
            weights along k. The bits give an integer, and the weight is that less 2^(bits - 1).
        scale: `[n, k / group]`, in the dtype that the weight shows.
    """

    tensor_data_names = ["planes", "scale"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(cls, planes: torch.Tensor, scale: torch.Tensor) -> BitPlaneTensor:
        shape = (planes.shape[1], planes.shape[2] * 8)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=scale.dtype, device=planes.device, requires_grad=False
        )

    def __init__(self, planes: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.planes = planes
        self.scale = scale

    @classmethod
    def round(cls, weight: torch.Tensor, bits: int, group: int) -> BitPlaneTensor:
        """Round a weight `[n, k]` to nearest.

        The largest magnitude of a group lies half a step beyond the largest number.
        """
        n, k = weight.shape
        half = 2 ** (bits - 1)
        groups = weight.float().reshape(n, k // group, group)
        scale = (groups.abs().amax(-1) / (half - 0.5)).clamp(min=_SMALLEST_SCALE).to(weight.dtype)
        q = (groups / scale.float().unsqueeze(-1)).round().clamp(-half, half - 1) + half
        return cls(_planes(q.reshape(n, k).to(torch.uint8), bits), scale)

    @classmethod
    def pack(cls, rounded: Rounded, bits: int) -> BitPlaneTensor:
        """Pack integers of a symmetric grid of `bits` bits."""
        return cls(_planes((rounded.q + 2 ** (bits - 1)).to(torch.uint8), bits), rounded.scale)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers `[n, k]`."""
        n, k = self.shape
        signed = self.integers().to(dtype)
        groups = signed.reshape(n, self.scale.shape[1], -1)
        weight: torch.Tensor = groups * self.scale.to(dtype).unsqueeze(-1)
        return weight.reshape(n, k)

    def integers(self) -> torch.Tensor:
        """Return int8 `[n, k]` from -2^(bits - 1)."""
        n, k = self.shape
        bits = self.planes.shape[0]
        places = torch.arange(8, dtype=torch.uint8, device=self.planes.device)
        q = torch.zeros(n, k, dtype=torch.uint8, device=self.planes.device)
        for bit, plane in enumerate(self.planes.unbind(0)):
            # A byte of a plane has one bit of eight numbers, the first number's lowest.
            ones = (plane.unsqueeze(-1) >> places) & 1
            q |= ones.reshape(n, k) << bit
        return cast(torch.Tensor, q.to(torch.int8) - 2 ** (bits - 1))


def _planes(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 `[n, k]` as bit planes `[bits, n, k / 8]`."""
    n, k = q.shape
    planes = torch.zeros(bits, n, k // 8, dtype=torch.uint8, device=q.device)
    for bit, plane in enumerate(planes.unbind(0)):
        for place, column in enumerate(q.reshape(n, k // 8, 8).unbind(-1)):
            plane |= ((column >> bit) & 1) << place
    return planes


def _neutral(stored: torch.Tensor) -> NeutralWeight:
    weight = cast(BitPlaneTensor, stored)
    bits, k = weight.planes.shape[0], weight.shape[1]
    return NeutralWeight(
        codes=weight.integers(),
        bits=bits,
        scale=weight.scale,
        group=k // weight.scale.shape[1],
        low=-(2 ** (bits - 1)),
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, cast(BitPlaneTensor, weight).unpack(x.dtype), bias)


def _unsupported(shape: LinearShape, _m: int, _device_type: str, *, group: int) -> str | None:
    return f"k={shape.k} is not divisible by the group size {group}" if shape.k % group else None


def make_format(bits: int, group: int) -> Format:
    """Return the format of symmetric weights of `bits` bits, with a scale for every `group`."""
    return Format(
        id=f"int{bits}-g{group}/bit-planes",
        quantize=functools.partial(BitPlaneTensor.round, bits=bits, group=group),
        dequantize=lambda stored: cast(BitPlaneTensor, stored).unpack(torch.float32),
        neutral=_neutral,
        tensor_type=BitPlaneTensor,
        unsupported=functools.partial(_unsupported, group=group),
        by_default=by_name_only,
        kernels=(
            Kernel(
                id="dequantize-matmul",
                numerics=A16,
                linear=_product,
                materializes=True,
                description="dequantize the weight, then the float product",
            ),
        ),
        description=(
            f"int{bits} weights, a symmetric scale for every {group} along k; no fast kernel"
        ),
    )


def _with_roundings(bits: int, group: int) -> tuple[Format, ...]:
    fmt = make_format(bits, group)
    grid = Grid(bits=bits, group=group, symmetric=True)
    pack = functools.partial(BitPlaneTensor.pack, bits=bits)
    return fmt, *rounded_formats(fmt, grid, pack, fmt.by_default)


FORMATS = tuple(fmt for choice in CHOICES for fmt in _with_roundings(*choice))

torch.serialization.add_safe_globals([BitPlaneTensor])
