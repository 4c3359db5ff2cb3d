"""The project's own product of a few rows with float8 weights (`float8_rows.cu`)."""

from __future__ import annotations

import torch

from autoquant.candidates.kernels.few_rows import multiply_rows, multiply_rows_of_experts
from autoquant.candidates.kernels.operators import define_operator

_SOURCE = "float8_rows.cu"
CHUNK_COLUMNS = 128
SETTINGS = (
    (1, (16, 1, 2), (16, 1, 2)),
    (2, (16, 1, 2), (16, 2, 1)),
    (4, (8, 1, 3), (8, 1, 2)),
    (8, (4, 1, 4), (4, 2, 4)),
    (0, (16, 1, 2), (4, 2, 4)),
)
"""See `Settings` of `few_rows`.

On an H200 (`python studies/gpu_linears/own_kernels/float8_settings.py`).
"""


def multiply_float8_rows(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply x `[..., k]`, up to 16 rows, by float8 `[n, k]` with scales `[n, 1]`.

    Returns:
        `[..., n]`, with the bias added.
    """
    return multiply_rows(_SOURCE, "float8_rows", SETTINGS, x, (values, scale), bias)


def multiply_float8_rows_of_experts(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Multiply x `[m, k]`, sorted by expert, by float8 `[experts * n, k]` with a scale a row.

    Args:
        ends: int32 `[experts]`, the row after the last of each.

    Returns:
        `[m, n]`.
    """
    parts = (values, scale)
    return multiply_rows_of_experts(_SOURCE, "float8_experts", SETTINGS, x, parts, ends)


def _empty_rows(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


float8_rows = define_operator("float8_rows", multiply_float8_rows, _empty_rows)
