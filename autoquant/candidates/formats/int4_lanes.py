"""int4 weights for the project's own CPU kernels.

A product of one row reads them at the speed of memory. 16 rows lie in the lanes of a vector, so any
CPU reads the layout; `kernels/rows.cpp` has the arithmetic. Columns are padded to whole groups, so
any k works. For many rows, matrix instructions are used, or the weight is unpacked first.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
import torch.nn.functional as F
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import A16, Format, Kernel, always_by_default, by_name_only
from autoquant.candidates.formats.int4_rounding import (
    ASYMMETRIC,
    GROUP_SIZES,
    SYMMETRIC,
    int4_description,
    int4_nearest,
    int4_values,
    with_roundings,
)
from autoquant.candidates.formats.rounding import Grid, Rounded
from autoquant.candidates.kernels.cpu_rows import cpu_rows_kernel, cpu_tiles_kernel, empty_rows
from autoquant.candidates.kernels.cpu_source import cpu_kernels_work, cpu_operator
from autoquant.candidates.neutral import NeutralWeight
from autoquant.records import LinearShape

LANES = 16
_WORD = 8


class Int4LanesTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """int4 weights `[n, k]` with 16 rows in the lanes of a vector.

    All tensors have n rows, and 16 of them belong together. So stacked weights form one weight.

    Tensor attributes:
        qdata: int32 `[n, padded k / 8]`. 16 rows have words `[padded k / 8, 16]`. Nibble (odd, p)
            of a word, at bit 16 * odd + 4 * p, is column 2 * p + odd.
        scale_and_zero: `[n, groups, 2]`, in the dtype that the weight shows. 16 rows have
            `[groups, 2, 16]`. The weight is (q - 8) * scale + zero. A symmetric weight has scales
            alone: `[n, groups, 1]`.
        columns: k.
    """

    tensor_data_names = ["qdata", "scale_and_zero"]  # noqa: RUF012
    tensor_attribute_names = ["columns"]  # noqa: RUF012

    def __new__(
        cls, qdata: torch.Tensor, scale_and_zero: torch.Tensor, columns: int
    ) -> Int4LanesTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            (qdata.shape[0], columns),
            dtype=scale_and_zero.dtype,
            device=qdata.device,
            requires_grad=False,
        )

    def __init__(self, qdata: torch.Tensor, scale_and_zero: torch.Tensor, columns: int) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale_and_zero = scale_and_zero
        self.columns = columns

    @classmethod
    def pack(
        cls, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> Int4LanesTensor:
        """Pack q `[n, k]` from 0 to 15, whose weight is (q - 8) * scale + zero.

        Args:
            scale: `[n, groups]`.
            zero: `[n, groups]`, or None if the weight is symmetric.
        """
        n, columns = q.shape
        group = _group(columns, scale.shape[1])
        q = F.pad(q.to(torch.int32), (0, group * scale.shape[1] - columns))
        nibbles = q.reshape(n // LANES, LANES, -1, _WORD // 2, 2).transpose(1, 2)
        words = torch.zeros(nibbles.shape[:-2], dtype=torch.int32, device=q.device)
        for pair in range(_WORD // 2):
            for odd in range(2):
                words |= nibbles[..., pair, odd] << (16 * odd + 4 * pair)
        parts = torch.stack((scale,) if zero is None else (scale, zero))
        lanes = parts.reshape(len(parts), n // LANES, LANES, -1).permute(1, 3, 0, 2)
        return cls(words.reshape(n, -1), lanes.reshape(n, -1, len(parts)), columns)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers `[k, n]`, the weight transposed."""
        n, groups, parts = self.scale_and_zero.shape
        lanes = self.scale_and_zero.reshape(n // LANES, groups, parts, 1, 1, LANES).to(dtype)
        numbers = (self._nibbles().to(dtype) - 8) * lanes[:, :, 0]
        if parts == 2:
            numbers += lanes[:, :, 1]
        return numbers.permute(1, 2, 3, 0, 4).reshape(-1, n)[: self.columns]

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the float32 numbers `[m, k]` of rows `[m]`, as `unpack` makes them."""
        n, groups, parts = self.scale_and_zero.shape
        block, lane = rows // LANES, rows % LANES
        words = self.qdata.reshape(n // LANES, -1, LANES)[block, :, lane]
        scales = self.scale_and_zero.reshape(n // LANES, groups, parts, LANES)[block, :, :, lane]
        q = (words.unsqueeze(-1) >> self._shifts()) & 15
        numbers = (q.float() - 8).reshape(len(rows), groups, -1) * scales[:, :, :1].float()
        if parts == 2:
            numbers += scales[:, :, 1:].float()
        return numbers.reshape(len(rows), -1)[:, : self.columns]

    def neutral(self) -> NeutralWeight:
        """Return the same numbers without the layout."""
        n, groups, parts = self.scale_and_zero.shape
        q = self._nibbles().permute(0, 4, 1, 2, 3).reshape(n, -1)[:, : self.columns]
        lanes = self.scale_and_zero.reshape(n // LANES, groups, parts, LANES)
        scale, *zero = lanes.permute(2, 0, 3, 1).reshape(parts, n, groups)
        return NeutralWeight(
            codes=q.to(torch.int8) - 8,
            bits=4,
            scale=scale,
            group=_group(self.columns, groups),
            low=-8,
            zero=zero[0] if zero else None,
        )

    def _nibbles(self) -> torch.Tensor:
        """Return int32 from 0 to 15, `[n / 16, groups, words, 8, 16]`."""
        n, groups = self.scale_and_zero.shape[:2]
        shifts = self._shifts().reshape(_WORD, 1)
        return (self.qdata.reshape(n // LANES, groups, -1, 1, LANES) >> shifts) & 15

    def _shifts(self) -> torch.Tensor:
        """Return the bit at which the nibble of each column of a word begins, int32 `[8]`."""
        columns = torch.arange(_WORD, dtype=torch.int32, device=self.qdata.device)
        return 16 * (columns % 2) + 4 * (columns // 2)


torch.serialization.add_safe_globals([Int4LanesTensor])


def _group(columns: int, groups: int) -> int:
    """Return the group size of which `groups` hold `columns`, the last one maybe in part."""
    return next(size for size in GROUP_SIZES if -(-columns // size) == groups)


_int4_rows = cpu_operator(
    "cpu_int4_lanes", "Tensor x, Tensor words, Tensor scale_and_zero, Tensor? bias", empty_rows
)

_int4_tiles = cpu_operator(
    "cpu_int4_tiles", "Tensor x, Tensor words, Tensor scale_and_zero, Tensor? bias", empty_rows
)


def _empty_numbers(words: torch.Tensor, scale_and_zero: torch.Tensor, k: int) -> torch.Tensor:
    return scale_and_zero.new_empty(k, words.shape[0])


_int4_unpack = cpu_operator(
    "cpu_int4_unpack", "Tensor words, Tensor scale_and_zero, int k", _empty_numbers
)


def _rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    stored = cast(Int4LanesTensor, weight)
    return _int4_rows(x, stored.qdata, stored.scale_and_zero, bias)


def _tiles(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    stored = cast(Int4LanesTensor, weight)
    return _int4_tiles(x, stored.qdata, stored.scale_and_zero, bias)


def _unpack_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    stored = cast(Int4LanesTensor, weight)
    if x.device.type == "cpu" and cpu_kernels_work():
        numbers = _int4_unpack(stored.qdata, stored.scale_and_zero, stored.columns)
    else:
        numbers = stored.unpack(stored.scale_and_zero.dtype)
    y = x.reshape(-1, x.shape[-1]) @ numbers.to(x.dtype)
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _unsupported(shape: LinearShape, _m: int, device_type: str) -> str | None:
    if device_type != "cpu":
        return "this int4 layout is for CPUs"
    return f"n={shape.n} is not divisible by {LANES}" if shape.n % LANES else None


def _pack(rounded: Rounded, grid: Grid) -> torch.Tensor:
    zero = None if grid.symmetric else rounded.zero
    return Int4LanesTensor.pack(rounded.q + 8, rounded.scale, zero)


def _format(grid: Grid) -> Format:
    return Format(
        id=f"{int4_values(grid)}/lanes",
        quantize=lambda weight: _pack(int4_nearest(weight, grid), grid),
        dequantize=lambda stored: cast(Int4LanesTensor, stored).unpack(torch.float32).t(),
        lookup=lambda stored, rows: cast(Int4LanesTensor, stored).rows(rows),
        neutral=lambda stored: cast(Int4LanesTensor, stored).neutral(),
        tensor_type=Int4LanesTensor,
        joins=True,
        unsupported=_unsupported,
        kernels=(
            cpu_rows_kernel(_rows, _unpack_matmul),
            cpu_tiles_kernel(_tiles, _unpack_matmul),
            Kernel(
                id="unpack-matmul",
                numerics=A16,
                linear=_unpack_matmul,
                materializes=True,
                description="unpack the weight, then the float product",
            ),
        ),
        by_default=by_name_only if grid.symmetric else always_by_default,
        description=f"{int4_description(grid)}, in lanes",
    )


FORMATS = tuple(
    fmt
    for grid in ASYMMETRIC + SYMMETRIC
    for fmt in with_roundings(_format(grid), grid, functools.partial(_pack, grid=grid))
)
