"""2:4 sparse weights: of every four along k, two are zero and not stored.

GPUs with sparse tensor cores multiply them in half the time (see `sparse24_cusparselt`). The layout
here is for any device: its numbers can be scored and saved, and no kernel is fast. So a search
tries it only by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import Format, Kernel, by_name_only
from autoquant.candidates.formats.low_bit import UNPACKING
from autoquant.candidates.formats.masks import (
    FOUR,
    KEPT,
    Mask,
    by_inputs,
    by_magnitude,
    compensated,
)
from autoquant.candidates.formats.rows import round_rows
from autoquant.candidates.inputs import InputStatistics
from autoquant.records import LinearShape

_FOURS_A_BYTE = 2


@dataclass(frozen=True, slots=True)
class Kept:
    """What the numbers that are kept are rounded to.

    Attributes:
        values: The `VALUES` of formats with such numbers.
        words: How a description names them.
        dtype: What they are stored as, with a scale for each row. None leaves them as they are.
    """

    values: str
    words: str
    dtype: torch.dtype | None = None

    def round(
        self, weight: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return numbers `[n, k]` as they are stored, and the scales `[n, 1]` or None.

        Args:
            dtype: The model's, also that of the scales.
        """
        if self.dtype is None:
            return weight.to(dtype), None
        return round_rows(weight, self.dtype, dtype)


FLOATS = Kept("sparse24", "unquantized")
INT8 = Kept("sparse24-int8", "int8", torch.int8)
FLOAT8 = Kept("sparse24-float8", "float8 e4m3", torch.float8_e4m3fn)
KINDS = (FLOATS, INT8, FLOAT8)


class Sparse24Tensor(TorchAOBaseTensor):  # type: ignore[misc]
    """Weights `[n, k]` of which two of every four along k are kept.

    Tensor attributes:
        kept: `[n, k / 2]`, the model's dtype, int8 or float8.
        places: uint8 `[n, k / 8]`. Each four has 4 bits, the first one's low: the places of the two
            in ascending order, two bits each.
        scale: `[n, 1]` in the dtype that the weight shows, or None if nothing was rounded.
    """

    tensor_data_names = ["kept", "places"]  # noqa: RUF012
    optional_tensor_data_names = ["scale"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(
        cls, kept: torch.Tensor, places: torch.Tensor, scale: torch.Tensor | None = None
    ) -> Sparse24Tensor:
        shape = (kept.shape[0], kept.shape[1] * FOUR // KEPT)
        dtype = kept.dtype if scale is None else scale.dtype
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=kept.device, requires_grad=False
        )

    def __init__(
        self, kept: torch.Tensor, places: torch.Tensor, scale: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.kept = kept
        self.places = places
        self.scale = scale

    @classmethod
    def pack(cls, numbers: torch.Tensor, scale: torch.Tensor | None) -> Sparse24Tensor:
        """Pack numbers `[n, k]` with at most two in every four that are not zero."""
        n = len(numbers)
        fours = numbers.float().reshape(n, -1, FOUR)
        there = (fours != 0).to(torch.uint8)
        places = there.argsort(dim=-1, descending=True, stable=True)[..., :KEPT].sort(-1).values
        kept = fours.gather(-1, places).to(numbers.dtype).reshape(n, -1)
        nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
        return cls(kept, nibbles[:, ::_FOURS_A_BYTE] | nibbles[:, 1::_FOURS_A_BYTE] << 4, scale)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers `[n, k]`."""
        n, k = self.shape
        nibbles = torch.stack((self.places & 15, self.places >> 4), dim=-1).reshape(n, k // FOUR)
        places = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).to(torch.int64)
        kept = self.kept.to(dtype)
        if self.scale is not None:
            kept = kept * self.scale.to(dtype)
        fours = kept.new_zeros(n, k // FOUR, FOUR)
        return fours.scatter(-1, places, kept.reshape(n, k // FOUR, KEPT)).reshape(n, k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to choose which numbers are kept: an ending of a format's `VALUES`, and its mask."""

    ending: str
    mask: Mask
    needs_inputs: bool
    description: str


CHOICES = (
    Choice(
        ending="",
        mask=by_magnitude,
        needs_inputs=False,
        description="the two largest of every four along k are kept",
    ),
    Choice(
        ending="-wanda",
        mask=by_inputs,
        needs_inputs=True,
        description="the two of every four that the layer's inputs count most are kept (Wanda)",
    ),
    Choice(
        ending="-sparsegpt",
        mask=compensated,
        needs_inputs=True,
        description="later columns make up for what is dropped (SparseGPT)",
    ),
)


def sparse_formats(
    kind: Kept,
    layout: str,
    pack: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    dequantize: Callable[[torch.Tensor], torch.Tensor],
    *,
    tensor_type: type[torch.Tensor],
    joins: bool,
    kernels: tuple[Kernel, ...],
    unsupported: Callable[[LinearShape, int, str], str | None],
) -> tuple[Format, ...]:
    """Return the formats of a kind in one layout, one for each choice of what is kept.

    Args:
        pack: Maps numbers `[n, k]` as they are stored, with zeros, and their scales `[n, 1]` or
            None to the stored tensor.
    """

    def quantize(
        weight: torch.Tensor, inputs: InputStatistics | None = None, *, mask: Mask
    ) -> torch.Tensor:
        return pack(*kind.round(mask(weight, inputs), weight.dtype))

    return tuple(
        Format(
            id=f"{kind.values}{choice.ending}/{layout}",
            quantize=functools.partial(quantize, mask=choice.mask),
            dequantize=dequantize,
            kernels=kernels,
            unsupported=unsupported,
            description=f"2:4 sparse weights, {kind.words}; {choice.description}",
            tensor_type=tensor_type,
            joins=joins,
            by_default=by_name_only,
            needs_inputs=choice.needs_inputs,
            rounds=f"{kind.values}/{layout}" if choice.ending else "",
        )
        for choice in CHOICES
    )


def _unsupported(shape: LinearShape, _m: int, _device_type: str) -> str | None:
    each = FOUR * _FOURS_A_BYTE
    return f"k={shape.k} is not divisible by {each}" if shape.k % each else None


FORMATS = tuple(
    fmt
    for kind in KINDS
    for fmt in sparse_formats(
        kind,
        "plain",
        Sparse24Tensor.pack,
        lambda stored: cast(Sparse24Tensor, stored).unpack(torch.float32),
        tensor_type=Sparse24Tensor,
        joins=True,
        kernels=(UNPACKING,),
        unsupported=_unsupported,
    )
)

torch.serialization.add_safe_globals([Sparse24Tensor])
