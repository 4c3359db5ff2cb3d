"""What a call of a linear looks like to code that watches or replaces functions, and whether there is such code."""

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


def is_plain_call(*tensors: torch.Tensor | None) -> bool:
    """Check that nobody traces, watches or differentiates a call with these tensors.

    Then the implementation of one of the project's operators may be called by itself, which saves PyTorch's way to it: 20 us
    on the host, longer than most products take on a GPU.

    Args:
        tensors: The first one is the activation.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return type(tensors[0]) is torch.Tensor and not any(t is not None and t.requires_grad for t in tensors)
