"""Weights of 2, 3 and 5 bits in groups along k, for quality and memory only.

No kernel here multiplies them faster than the dequantized weight, so a search tries them only by
name, or for an engine that is quick with them. They are stored as bit planes, which waste no bits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import A16, Format, Kernel, by_name_only
from autoquant.candidates.formats.rounding import Grid, Rounded, rounded_formats
from autoquant.candidates.neutral import NeutralWeight
from autoquant.records import LinearShape

CHOICES: Mapping[str, Grid] = {
    "int3-g32": Grid(bits=3, group=32, symmetric=True),
    "int3-g64": Grid(bits=3, group=64, symmetric=True),
    "int2-g32": Grid(bits=2, group=32, symmetric=True),
    "int5s-g32": Grid(bits=5, group=32, symmetric=True),
    # As the engine that holds it: 16 bits of the smallest number, which better rounding keeps to.
    "int5-g32": Grid(bits=5, group=32, symmetric=False, from_low=True),
}
"""The grids, by the values that formats of them hold."""
_SMALLEST_SCALE = 1e-12


class BitPlaneTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """Integer weights `[n, k]` of few bits with a scale for each group along k.

    Tensor attributes:
        planes: uint8 `[bits, n, k / 8]`, the lowest bits first. Each byte holds one bit of eight
            weights along k.
        scale: `[n, k / group]`, in the dtype that the weight shows.
        low: Like `scale`: the number of the integer 0. If it is None, the weight is symmetric: the
            integer less 2^(bits - 1), times the scale.
    """

    tensor_data_names = ["planes", "scale"]  # noqa: RUF012
    optional_tensor_data_names = ["low"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(
        cls, planes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor | None = None
    ) -> BitPlaneTensor:
        shape = (planes.shape[1], planes.shape[2] * 8)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=scale.dtype, device=planes.device, requires_grad=False
        )

    def __init__(
        self, planes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.planes = planes
        self.scale = scale
        self.low = low

    @classmethod
    def round(cls, weight: torch.Tensor, grid: Grid) -> BitPlaneTensor:
        """Round a weight `[n, k]` to nearest.

        Of a symmetric grid, the largest magnitude of a group lies half a step beyond the largest
        number. Of another, the smallest and the largest number lie on the ends.
        """
        n, k = weight.shape
        groups = weight.float().reshape(n, -1, grid.group)
        scale, zero = grid.fitted(*grid.ends(groups), weight.dtype)
        q = grid.integers(groups, scale, zero).reshape(n, k)
        return cls.pack(Rounded(q, scale[..., 0].to(weight.dtype), zero[..., 0]), grid)

    @classmethod
    def pack(cls, rounded: Rounded, grid: Grid) -> BitPlaneTensor:
        """Pack integers of a grid."""
        planes = bit_planes((rounded.q + grid.half).to(torch.uint8), grid.bits)
        if grid.symmetric:
            return cls(planes, rounded.scale)
        low = rounded.zero.float() - grid.half * rounded.scale.float()
        return cls(planes, rounded.scale, low.to(rounded.scale.dtype))

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers `[n, k]`."""
        n, k = self.shape
        groups = self.integers().to(dtype).reshape(n, self.scale.shape[1], -1)
        weight: torch.Tensor = groups * self.scale.to(dtype).unsqueeze(-1)
        if self.low is not None:
            weight = weight + self.low.to(dtype).unsqueeze(-1)
        return weight.reshape(n, k)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the float32 numbers `[m, k]` of rows `[m]`."""
        low = None if self.low is None else self.low[rows]
        return BitPlaneTensor(self.planes[:, rows], self.scale[rows], low).unpack(torch.float32)

    @property
    def smallest(self) -> int:
        """The smallest integer: -2^(bits - 1), or 0 if the numbers begin at `low`."""
        return -(2 ** (self.planes.shape[0] - 1)) if self.low is None else 0

    def integers(self) -> torch.Tensor:
        """Return int8 `[n, k]` from `smallest`."""
        return integers_of(self.planes).to(torch.int8) + self.smallest


def integers_of(planes: torch.Tensor) -> torch.Tensor:
    """Return uint8 `[n, k]` from bit planes `[bits, n, k / 8]`."""
    places = torch.arange(8, dtype=torch.uint8, device=planes.device)
    n, k = planes.shape[1], planes.shape[2] * 8
    q = torch.zeros(n, k, dtype=torch.uint8, device=planes.device)
    for bit, plane in enumerate(planes.unbind(0)):
        # A byte of a plane has one bit of eight numbers, the first number's lowest.
        ones = (plane.unsqueeze(-1) >> places) & 1
        q |= ones.reshape(n, k) << bit
    return q


def bit_planes(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 `[n, k]` as bit planes `[bits, n, k / 8]`."""
    n, k = q.shape
    planes = torch.zeros(bits, n, k // 8, dtype=torch.uint8, device=q.device)
    for bit, plane in enumerate(planes.unbind(0)):
        for place, column in enumerate(q.reshape(n, k // 8, 8).unbind(-1)):
            plane |= ((column >> bit) & 1) << place
    return planes


def _neutral(stored: torch.Tensor) -> NeutralWeight:
    weight = cast(BitPlaneTensor, stored)
    return NeutralWeight(
        codes=weight.integers(),
        bits=weight.planes.shape[0],
        scale=weight.scale,
        group=weight.shape[1] // weight.scale.shape[1],
        low=weight.smallest,
        zero=weight.low,
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, cast(Any, weight).unpack(x.dtype), bias)


UNPACKING = Kernel(
    id="dequantize-matmul",
    numerics=A16,
    linear=_product,
    materializes=True,
    description="dequantize the weight, then the float product",
)
"""The kernel of tensors that `unpack` their numbers."""


def _unsupported(shape: LinearShape, _m: int, _device_type: str, *, group: int) -> str | None:
    return f"k={shape.k} is not divisible by the group size {group}" if shape.k % group else None


def make_format(values: str, grid: Grid) -> Format:
    """Return the format of the weights of a grid, which have these values."""
    scales = "a symmetric scale" if grid.symmetric else "scale and smallest number"
    return Format(
        id=f"{values}/bit-planes",
        quantize=functools.partial(BitPlaneTensor.round, grid=grid),
        dequantize=lambda stored: cast(BitPlaneTensor, stored).unpack(torch.float32),
        lookup=lambda stored, rows: cast(BitPlaneTensor, stored).rows(rows),
        neutral=_neutral,
        tensor_type=BitPlaneTensor,
        unsupported=functools.partial(_unsupported, group=grid.group),
        by_default=by_name_only,
        kernels=(UNPACKING,),
        description=(
            f"int{grid.bits} weights, {scales} for every {grid.group} along k; no fast kernel"
        ),
    )


def _with_roundings(values: str, grid: Grid) -> tuple[Format, ...]:
    fmt = make_format(values, grid)
    pack = functools.partial(BitPlaneTensor.pack, grid=grid)
    return fmt, *rounded_formats(fmt, grid, pack, fmt.by_default)


FORMATS = tuple(fmt for choice in CHOICES.items() for fmt in _with_roundings(*choice))

torch.serialization.add_safe_globals([BitPlaneTensor])
