"""Round weights to 8 bits with a scale for each row, as the formats without one in torchao do."""

from __future__ import annotations

import torch

from autoquant.candidates.base import LARGEST

_SMALLEST_SCALE = 1e-12


def round_rows(
    weight: torch.Tensor, to: torch.dtype, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight `[n, k]` to int8 or float8 (e4m3).

    The scale is rounded before it divides the weight, as in `int8-row`.

    Args:
        to: int8 or float8_e4m3fn.
        dtype: The model's, and that of the scales.

    Returns:
        Numbers `[n, k]` and scales `[n, 1]`.
    """
    largest = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=_SMALLEST_SCALE)
    scale = (largest / LARGEST[to]).to(dtype).clamp(min=torch.finfo(dtype).tiny)
    scaled = weight.float() / scale.float()
    scaled = scaled.round() if to == torch.int8 else scaled
    return scaled.clamp(-LARGEST[to], LARGEST[to]).to(to), scale
