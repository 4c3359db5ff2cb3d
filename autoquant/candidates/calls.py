"""What a call of a linear looks like to code that watches or replaces functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

LINEAR_FUNCTIONS = (F.linear, torch.ops.aten.linear.default)
"""A module's `F.linear`, and the operator that an exported program calls."""


def linear_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Activation, weight and bias of a call, however they were passed."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
    return given["input"], given["weight"], given.get("bias")
