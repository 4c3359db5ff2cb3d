"""What int4 weights hold, whatever their layout: integers from -8 to 7 in groups along k.

`int4-g64` is tinygemm's rounding: q * scale + zero, with 16-bit scale and zero for each group.
`int4s-g64` is symmetric: q * scale. Most engines hold only that, so it has its own quality score.
Its scales are positive: XNNPACK refuses others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _quantize_affine_tinygemm,
)

from autoquant.candidates.base import Format, by_name_only
from autoquant.candidates.formats.rounding import (
    Grid,
    Rounded,
    nearest,
    round_padded,
    rounded_formats,
)

GROUP_SIZES = (32, 64, 128)
ASYMMETRIC = tuple(Grid(bits=4, group=group, symmetric=False) for group in GROUP_SIZES)
SYMMETRIC = tuple(Grid(bits=4, group=group, symmetric=True) for group in GROUP_SIZES)


def int4_values(grid: Grid) -> str:
    """Return the `VALUES` of formats that hold the numbers of a grid."""
    return f"int4{'s' if grid.symmetric else ''}-g{grid.group}"


def int4_description(grid: Grid) -> str:
    """Return what a description says of a grid: its numbers and groups."""
    parts = "a symmetric scale" if grid.symmetric else "scale and zero point"
    return f"int4 weights, {parts} for every {grid.group} along k"


def tinygemm_rounding(
    weight: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight `[n, k]`.

    The last group may be in part.

    Returns:
        q int32 `[n, k]` from 0 to 15, scale and zero `[n, groups]` in the weight's dtype. The
        numbers are (q - 8) * scale + zero.
    """
    n, k = weight.shape
    weight = F.pad(weight, (0, -k % group))
    block = (1, group)
    scale, zero = _choose_qparams_affine_tinygemm(
        weight, MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-6, None, weight.dtype
    )
    q = _quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
    return q[:, :k], scale.reshape(n, -1), zero.reshape(n, -1)


def int4_nearest(weight: torch.Tensor, grid: Grid) -> Rounded:
    """Round a weight `[n, k]` to the nearest numbers of a grid. The last group may be in part."""
    if grid.symmetric:
        return round_padded(weight, grid, nearest)
    q, scale, zero = tinygemm_rounding(weight, grid.group)
    return Rounded(q - 8, scale, zero)


def with_roundings(
    fmt: Format, grid: Grid, pack: Callable[[Rounded], torch.Tensor]
) -> tuple[Format, ...]:
    """Return an int4 format that rounds to nearest, and all other roundings by name only."""
    return fmt, *rounded_formats(fmt, grid, pack, by_name_only)
