"""int4 weights for the project's own CUDA kernels.

They read a weight in half the time of an 8-bit one. Other libraries' int4 kernels spend more time
on unpacking than on reading. Here weights lie in the order of tensor cores, two instructions turn
two weights into operands, and scales are applied to sums. `kernels/int4_tiled.cu` has the layout
and the arithmetic. The magic numbers are those of FasterTransformer and Marlin (Frantar et al.,
"MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models", 2024).

For many rows, a separate kernel unpacks the weight first.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import (
    A16,
    FLOAT8_MAX,
    W8_A8_FLOAT8_ROW,
    Format,
    Kernel,
    always_by_default,
    by_name_only,
)
from autoquant.candidates.calls import grouped_product, is_plain_call
from autoquant.candidates.formats.float8 import (
    float8_grouped_product,
    float8_product,
    float8_product_unsupported,
)
from autoquant.candidates.formats.int4_rounding import (
    ASYMMETRIC,
    SYMMETRIC,
    int4_description,
    int4_nearest,
    int4_values,
    with_roundings,
)
from autoquant.candidates.formats.rounding import Grid, Rounded
from autoquant.candidates.kernels.cuda_source import cuda_kernel, cuda_source_unsupported
from autoquant.candidates.kernels.few_rows import (
    multiply_rows,
    multiply_rows_of_experts,
    rows_kernel,
    too_many_rows,
)
from autoquant.candidates.kernels.operators import define_operator
from autoquant.candidates.neutral import NeutralWeight
from autoquant.records import LinearShape

_SOURCE = "int4_tiled.cu"
TILE_ROWS, TILE_COLUMNS = 8, 128
_LANES, _WORDS, _PAIRS = 4, 4, 4
_UNPACKING_THREADS = 256
SETTINGS = (
    (1, (16, 1, 1), (16, 1, 2)),
    (2, (16, 1, 2), (16, 2, 1)),
    (4, (8, 1, 2), (8, 1, 3)),
    (32, (4, 1, 4), (4, 2, 3)),
    (0, (4, 4, 4), (4, 2, 3)),
)
"""`Settings` of `few_rows` for an H200.

`python studies/gpu_linears/own_kernels/int4_settings.py` measures them.
"""


class Int4TiledTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """int4 weights `[n, k]` in tiles of 8 rows and 128 columns, one for each warp.

    See `kernels/int4_tiled.cu`. All tensors have n rows, and 8 of them belong together. So stacked
    weights form one weight.

    Tensor attributes:
        qdata: int32 `[n, k / 8]`. A tile has words `[8, 4, 4]` by row a, lane b and j. Nibble
            (odd, p) of a word, lowest first, is column 32 * j + 8 * b + 2 * p + odd.
        scale_and_zero: `[n, k / group, 2]`, in the dtype that the weight shows. A tile has
            `[8, groups, 2]`. The weight is (q - 8) * scale + zero. A symmetric one has zeros of 0,
            which the kernels read.
        row_scale: float32 `[n, 1]`, the largest number of each row over float8's largest.
    """

    tensor_data_names = ["qdata", "scale_and_zero", "row_scale"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(
        cls, qdata: torch.Tensor, scale_and_zero: torch.Tensor, row_scale: torch.Tensor
    ) -> Int4TiledTensor:
        shape = (qdata.shape[0], qdata.shape[1] * 8)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=scale_and_zero.dtype, device=qdata.device, requires_grad=False
        )

    def __init__(
        self, qdata: torch.Tensor, scale_and_zero: torch.Tensor, row_scale: torch.Tensor
    ) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale_and_zero = scale_and_zero
        self.row_scale = row_scale

    @property
    def group(self) -> int:
        """The number of columns that share a scale."""
        return int(self.qdata.shape[1] * 8 // self.scale_and_zero.shape[1])

    @classmethod
    def pack(cls, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Int4TiledTensor:
        """Pack q `[n, k]` from 0 to 15, whose weight is (q - 8) * scale + zero.

        Args:
            scale: `[n, k / group]`.
            zero: `[n, k / group]`.
        """
        n, k = q.shape
        high, wide = n // TILE_ROWS, k // TILE_COLUMNS
        nibbles = q.to(torch.int32).reshape(high, TILE_ROWS, wide, _WORDS, _LANES, _PAIRS, 2)
        nibbles = nibbles.permute(0, 2, 1, 4, 3, 5, 6)  # tile, row a, lane b, word j, pair p, odd
        words = torch.zeros(nibbles.shape[:-2], dtype=torch.int32, device=q.device)
        for pair in range(_PAIRS):
            for odd in range(2):
                words |= nibbles[..., pair, odd] << (4 * pair + 16 * odd)
        both = (
            torch.stack((scale, zero), dim=-1).reshape(high, TILE_ROWS, wide, -1, 2).transpose(1, 2)
        )
        packed = cls(words.reshape(n, k // 8), both.reshape(n, -1, 2), torch.empty(0))
        largest = packed.unpack(torch.float32).abs().amax(dim=1, keepdim=True)
        return cls(packed.qdata, packed.scale_and_zero, largest.clamp(min=1e-12) / FLOAT8_MAX)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers `[n, k]`."""
        n, k = self.shape
        q, both = self._nibbles(), self._scales().unsqueeze(2).to(dtype)
        return (
            (q.reshape(n, both.shape[1], -1).to(dtype) - 8) * both[..., 0] + both[..., 1]
        ).reshape(n, k)

    def neutral(self) -> NeutralWeight:
        """Return the same numbers without the layout."""
        scale, zero = self._scales().unbind(-1)
        q = self._nibbles().to(torch.int8) - 8
        return NeutralWeight(codes=q, bits=4, scale=scale, group=self.group, low=-8, zero=zero)

    def _scales(self) -> torch.Tensor:
        """Return scale and zero `[n, k / group, 2]`, row by row."""
        n, k = self.shape
        high, wide = n // TILE_ROWS, k // TILE_COLUMNS
        tiles = self.scale_and_zero.reshape(high, wide, TILE_ROWS, -1, 2)
        return tiles.transpose(1, 2).reshape(n, -1, 2)

    def _nibbles(self) -> torch.Tensor:
        """Return int32 `[n, k]` from 0 to 15."""
        n, k = self.shape
        high, wide = n // TILE_ROWS, k // TILE_COLUMNS
        shifts = torch.tensor(
            [[4 * pair, 4 * pair + 16] for pair in range(_PAIRS)], dtype=torch.int32
        )
        words = self.qdata.reshape(high, wide, TILE_ROWS, _LANES, _WORDS, 1, 1)
        q = ((words >> shifts.to(words.device)) & 15).permute(0, 2, 1, 4, 3, 5, 6)
        return q.reshape(n, k)


torch.serialization.add_safe_globals([Int4TiledTensor])


def multiply_int4_rows(
    x: torch.Tensor, qdata: torch.Tensor, scale_and_zero: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply x `[..., k]`, up to 16 rows in all, by an `Int4TiledTensor` `[n, k]`."""
    group = x.shape[-1] // scale_and_zero.shape[1]
    return multiply_rows(
        _SOURCE, "int4_rows", SETTINGS, x, (qdata, scale_and_zero), bias, (("GROUP", group),)
    )


def _empty_rows(
    x: torch.Tensor, qdata: torch.Tensor, scale_and_zero: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], qdata.shape[0])


int4_rows = define_operator("int4_rows", multiply_int4_rows, _empty_rows)


def unpack_int4_tiles(
    qdata: torch.Tensor, scale_and_zero: torch.Tensor, row_scale: torch.Tensor, float8: bool
) -> torch.Tensor:
    """Return the numbers `[n, k]` as bfloat16, or as float8 over the row's scale."""
    n, k = qdata.shape[0], 8 * qdata.shape[1]
    tiles = n * k // (TILE_ROWS * TILE_COLUMNS)
    defines = (("GROUP", k // scale_and_zero.shape[1]), ("FLOAT8", int(float8)))
    kernel = cuda_kernel(_SOURCE, "int4_unpack", defines, qdata.device)
    out = qdata.new_empty(n, k, dtype=torch.float8_e4m3fn if float8 else torch.bfloat16)
    blocks = -(-tiles // (_UNPACKING_THREADS // 32))
    kernel.launch(
        blocks, _UNPACKING_THREADS, qdata, scale_and_zero, row_scale, out, tiles, k // TILE_COLUMNS
    )
    return out


def _empty_numbers(
    qdata: torch.Tensor, scale_and_zero: torch.Tensor, row_scale: torch.Tensor, float8: bool
) -> torch.Tensor:
    dtype = torch.float8_e4m3fn if float8 else torch.bfloat16
    return qdata.new_empty(qdata.shape[0], 8 * qdata.shape[1], dtype=dtype)


int4_unpack = define_operator("int4_unpack", unpack_int4_tiles, _empty_numbers)


def _rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    stored = cast(Int4TiledTensor, weight)
    product = multiply_int4_rows if is_plain_call(x, bias) else int4_rows
    return cast(torch.Tensor, product(x, stored.qdata, stored.scale_and_zero, bias))


def _rows_of_experts(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    stored = cast(Int4TiledTensor, weight)
    parts = (stored.qdata, stored.scale_and_zero)
    defines = (("GROUP", stored.group),)
    return multiply_rows_of_experts(_SOURCE, "int4_experts", SETTINGS, x, parts, ends, defines)


def _unpacked(weight: torch.Tensor, *, float8: bool) -> torch.Tensor:
    stored = cast(Int4TiledTensor, weight)
    unpack = unpack_int4_tiles if is_plain_call(stored.qdata) else int4_unpack
    return cast(torch.Tensor, unpack(stored.qdata, stored.scale_and_zero, stored.row_scale, float8))


def _unpack_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(x, _unpacked(weight, float8=False), bias)


def _unpack_grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return grouped_product(x, _unpacked(weight, float8=False), ends)


def _unpack_scaled_mm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    row_scale = cast(Int4TiledTensor, weight).row_scale
    return float8_product(x, _unpacked(weight, float8=True), row_scale, bias)


def _unpack_scaled_grouped_mm(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    row_scale = cast(Int4TiledTensor, weight).row_scale
    return float8_grouped_product(x, _unpacked(weight, float8=True), row_scale, ends)


def _unsupported(shape: LinearShape, _m: int, device_type: str) -> str | None:
    if reason := cuda_source_unsupported(device_type, "this int4 layout"):
        return reason
    if shape.dtype != "bfloat16":
        return f"int4 kernels take bfloat16 activations, not {shape.dtype}"
    if shape.n % TILE_ROWS or shape.k % TILE_COLUMNS:
        wanted = f"n divisible by {TILE_ROWS} and k by {TILE_COLUMNS}"
        return f"tiles need {wanted}, not {shape.n}x{shape.k}"
    return None


def _pack(rounded: Rounded) -> torch.Tensor:
    return Int4TiledTensor.pack(rounded.q + 8, rounded.scale, rounded.zero)


def _neutral(stored: torch.Tensor, *, symmetric: bool) -> NeutralWeight:
    found = cast(Int4TiledTensor, stored).neutral()
    return replace(found, zero=None) if symmetric else found


def _format(grid: Grid) -> Format:
    return Format(
        id=f"{int4_values(grid)}/tiled",
        quantize=lambda weight: _pack(int4_nearest(weight, grid)),
        dequantize=lambda stored: cast(Int4TiledTensor, stored).unpack(torch.float32),
        neutral=functools.partial(_neutral, symmetric=grid.symmetric),
        tensor_type=Int4TiledTensor,
        joins=True,
        unsupported=_unsupported,
        kernels=(
            rows_kernel(_rows, too_many_rows, _rows_of_experts),
            Kernel(
                id="unpack-matmul",
                numerics=A16,
                linear=_unpack_matmul,
                grouped=_unpack_grouped_mm,
                materializes=True,
                description="the project's own unpacking, then the bfloat16 product",
            ),
            Kernel(
                id="unpack-scaled-mm",
                numerics=W8_A8_FLOAT8_ROW,
                linear=_unpack_scaled_mm,
                grouped=_unpack_scaled_grouped_mm,
                arithmetic="float8",
                materializes=True,
                unsupported=float8_product_unsupported,
                description=(
                    "weight unpacked to float8, activation rows rounded to it, then "
                    "torch._scaled_mm"
                ),
            ),
        ),
        by_default=by_name_only if grid.symmetric else always_by_default,
        description=f"{int4_description(grid)}, as the project's kernels read them",
    )


FORMATS = tuple(
    fmt for grid in ASYMMETRIC + SYMMETRIC for fmt in with_roundings(_format(grid), grid, _pack)
)
