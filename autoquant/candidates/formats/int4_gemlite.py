"""int4 weights in groups along k in gemlite's packing, which has no class in torchao."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import A8_ROW, A16, Format, Kernel, by_name_only, round_row_int8
from autoquant.candidates.formats.int4_rounding import (
    ASYMMETRIC,
    tinygemm_rounding,
    with_roundings,
)
from autoquant.candidates.formats.int4_tinygemm import dequantize_kernel, int4_unsupported
from autoquant.candidates.formats.rounding import Rounded
from autoquant.candidates.kernels.gemlite import GEMLITE, gemlite_unsupported, linear_w4
from autoquant.candidates.neutral import NeutralWeight
from autoquant.records import LinearShape


class Int4GemliteTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """int4 weights `[n, k]` as gemlite reads them.

    Tensor attributes:
        qdata: int32 `[k / 8, n]`, eight weights along k in each word, lowest bits first.
        scale: `[k / group, n]`, in the dtype that the weight shows.
        offset: Like `scale`. The weight is q * scale + offset.
    """

    tensor_data_names = ["qdata", "scale", "offset"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(
        cls, qdata: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor
    ) -> Int4GemliteTensor:
        shape = (qdata.shape[1], qdata.shape[0] * 8)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=scale.dtype, device=qdata.device, requires_grad=False
        )

    def __init__(self, qdata: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.offset = offset

    @classmethod
    def pack(cls, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Int4GemliteTensor:
        """Pack q `[n, k]` from 0 to 15, whose weight is (q - 8) * scale + zero.

        Args:
            scale: `[n, k / group]`.
            zero: `[n, k / group]`.
        """
        n, k = q.shape
        words = _words(q.reshape(n, k // 8, 8).to(torch.int32))
        offset = (zero.float() - 8 * scale.float()).to(scale.dtype)
        return cls(words.t().contiguous(), scale.t().contiguous(), offset.t().contiguous())

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers `[n, k]` that gemlite multiplies with."""
        n, k = self.shape
        q = self._nibbles().reshape(n, self.scale.shape[0], -1).to(dtype)
        return (
            q * self.scale.t().unsqueeze(-1).to(dtype) + self.offset.t().unsqueeze(-1).to(dtype)
        ).reshape(n, k)

    def neutral(self) -> NeutralWeight:
        """Return the same numbers without the layout."""
        n, k = self.shape
        return NeutralWeight(
            codes=self._nibbles().reshape(n, k).to(torch.int8),
            bits=4,
            scale=self.scale.t(),
            group=k // self.scale.shape[0],
            zero=self.offset.t(),
        )

    def _nibbles(self) -> torch.Tensor:
        """Return int32 `[n, k / 8, 8]` from 0 to 15."""
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.qdata.device)
        return (self.qdata.t().unsqueeze(-1) >> shifts) & 15


def _words(nibbles: torch.Tensor) -> torch.Tensor:
    """Pack nibbles `[..., 8]` into int32 `[...]`, with the first one in the lowest bits."""
    word = torch.zeros_like(nibbles[..., 0])
    for position, nibble in enumerate(nibbles.unbind(-1)):
        word |= nibble << (4 * position)
    return word


torch.serialization.add_safe_globals([Int4GemliteTensor])


def _gemlite_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    stored = cast(Int4GemliteTensor, weight)
    return linear_w4(x, stored.qdata, stored.scale, stored.offset, bias)


def _pack_gemlite(rounded: Rounded) -> torch.Tensor:
    return Int4GemliteTensor.pack(rounded.q + 8, rounded.scale, rounded.zero)


def _gemlite_unsupported(shape: LinearShape, m: int, device_type: str, *, group: int) -> str | None:
    return int4_unsupported(shape, m, device_type, group=group) or gemlite_unsupported(
        shape, m, device_type
    )


def _gemlite_float(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return cast(Int4GemliteTensor, weight).unpack(dtype)


def _int_mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # Groups have scales of their own, so their integers cannot be summed over a row. The weight is
    # rounded once more, to eight bits with one scale for each row.
    values, scale = round_row_int8(_gemlite_float(weight, x.dtype))
    rows = x.reshape(-1, x.shape[-1])
    rounded, x_scale = round_row_int8(rows)
    y = torch._int_mm(rounded, values.t()).float()
    y = y * x_scale * scale.t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], values.shape[0])


def _int_mm_unsupported(_shape: LinearShape, m: int, _device_type: str) -> str | None:
    return f"_int_mm needs more than 16 rows on CUDA, not {m}" if m <= 16 else None


def _gemlite(group: int) -> Format:
    return Format(
        id=f"int4-g{group}/gemlite",
        quantize=lambda weight: Int4GemliteTensor.pack(*tinygemm_rounding(weight, group)),
        dequantize=lambda stored: _gemlite_float(stored, torch.float32),
        neutral=lambda stored: cast(Int4GemliteTensor, stored).neutral(),
        tensor_type=Int4GemliteTensor,
        unsupported=functools.partial(_gemlite_unsupported, group=group),
        kernels=(
            Kernel(
                id="gemlite",
                numerics=A16,
                linear=_gemlite_linear,
                opaque=True,
                library=GEMLITE,
                description="gemlite's weight-only product",
            ),
            dequantize_kernel(_gemlite_float),
            Kernel(
                id="int-mm",
                numerics=A8_ROW,
                linear=_int_mm,
                arithmetic="int8",
                materializes=True,
                unsupported=_int_mm_unsupported,
                description="weight and activation rows rounded to int8, integer product",
            ),
        ),
        # It takes the longest to tune, and was nowhere the fastest int4 (studies/gpu_linears).
        by_default=by_name_only,
        description=(
            f"int4 weights, scale and offset for every {group} along k, eight weights along k in "
            "a word"
        ),
    )


FORMATS = tuple(
    fmt for grid in ASYMMETRIC for fmt in with_roundings(_gemlite(grid.group), grid, _pack_gemlite)
)
