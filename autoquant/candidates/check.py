"""Check what a kernel computed against a float32 reference that uses nothing of the kernel.

The same rule holds wherever a kernel is checked: when it is timed, when a plan is proven, and when
a plan is applied or loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

MAX_RELATIVE_ERROR = 0.02
"""Largest norm of the error over the norm of the reference."""
MAX_ELEMENT_ERROR = 0.25
"""Largest error of one output over the root mean square of the reference.

A norm over thousands of outputs hardly shows that one of them is wrong. An output far above the
others may be off by `MAX_RELATIVE_ERROR` of itself besides.
"""


def reference(
    rounding: Callable[[torch.Tensor], torch.Tensor],
    numbers: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return the float32 result `[..., n]` of a linear, with the kernel's rounding.

    Args:
        rounding: How the kernel rounds the activation: `Format.activation_rounding`.
        numbers: What the kernel multiplies with: `multiplied_numbers`, float32 `[n, k]`.
        x: `[..., k]`.
    """
    return F.linear(rounding(x.float()), numbers, None if bias is None else bias.float())


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the error over the norm of the reference."""
    return float(((y.float() - expected).norm() / expected.norm()).item())


def fault(y: object, expected: torch.Tensor, dtype: torch.dtype, *, allowance: float = 1) -> str:
    """Return what is wrong with a result, or an empty string.

    Args:
        y: What the kernel returned.
        expected: From `reference`.
        dtype: The dtype that the result must have.
        allowance: How many times the usual errors are allowed.
    """
    if type(y) is not torch.Tensor or (y.shape, y.dtype) != (expected.shape, dtype):
        return f"it returns {_kind(y)}, not a plain {dtype} tensor {tuple(expected.shape)}"
    if expected.numel() == 0:
        return ""
    error = relative_error(y, expected)
    if not error <= allowance * MAX_RELATIVE_ERROR:  # NaN counts as wrong
        return f"relative error {error:.3g} against the float32 reference"
    typical = expected.norm() / expected.numel() ** 0.5
    beyond = (y.float() - expected).abs() - allowance * MAX_RELATIVE_ERROR * expected.abs()
    worst = (beyond.max() / typical).item()
    if not worst <= allowance * MAX_ELEMENT_ERROR:
        return f"an output is off by {worst:.2g} times a typical one of the float32 reference"
    return ""


def changed(y: torch.Tensor, before: torch.Tensor) -> bool:
    """Check whether two results of the same call differ in a bit of a number."""
    return bool((y != before).sum().item())


def _kind(y: object) -> str:
    if isinstance(y, torch.Tensor):
        return f"a {type(y).__name__} {tuple(y.shape)} of {y.dtype}"
    return type(y).__name__
