"""Check what a kernel computed against float32, where nothing of the kernel is used.

The same rule holds wherever a kernel is checked: when it is timed, when a plan is proven, and when
a plan is applied or loaded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from autoquant.candidates.base import ACTIVATION_ROUNDING, Format, Kernel, multiplied_numbers

MAX_RELATIVE_ERROR = 0.02
"""Largest norm of the error over the norm of the reference."""
MAX_ELEMENT_ERROR = 0.25
"""Largest error of one output over the root mean square of the reference.

A norm over thousands of outputs hardly shows that one of them is wrong.
"""


def reference(
    fmt: Format, kernel: Kernel, stored: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the float32 result `[..., n]` of a linear, with the kernel's rounding.

    Args:
        stored: A weight `[n, k]` in the format.
        x: `[..., k]`.
    """
    return F.linear(
        ACTIVATION_ROUNDING[kernel.numerics](x.float()),
        multiplied_numbers(fmt, stored, kernel.numerics),
        None if bias is None else bias.float(),
    )


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the error over the norm of the reference."""
    return ((y.float() - expected).norm() / expected.norm()).item()


def fault(y: object, expected: torch.Tensor, dtype: torch.dtype) -> str:
    """Return what is wrong with a result, or an empty string.

    Args:
        y: What the kernel returned.
        expected: From `reference`.
        dtype: The dtype that the result must have.
    """
    if type(y) is not torch.Tensor or (y.shape, y.dtype) != (expected.shape, dtype):
        return f"it returns {_kind(y)}, not a plain {dtype} tensor {tuple(expected.shape)}"
    if expected.numel() == 0:
        return ""
    error = relative_error(y, expected)
    if not error <= MAX_RELATIVE_ERROR:  # NaN counts as wrong
        return f"relative error {error:.3g} against the float32 reference"
    typical = expected.norm() / expected.numel() ** 0.5
    worst = ((y.float() - expected).abs().max() / typical).item()
    if not worst <= MAX_ELEMENT_ERROR:
        return f"an output is off by {worst:.2g} times a typical one of the float32 reference"
    return ""


def changed(y: torch.Tensor, before: torch.Tensor) -> bool:
    """Check whether two results of the same call differ in a bit of a number."""
    return bool((y != before).sum().item())


def _kind(y: object) -> str:
    if isinstance(y, torch.Tensor):
        return f"a {type(y).__name__} {tuple(y.shape)} of {y.dtype}"
    return type(y).__name__
