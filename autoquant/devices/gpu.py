"""Reasons why kernels for GPUs cannot be used, in words."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch


def needs_cuda(device_type: str, what: str, capability: tuple[int, int] = (8, 0)) -> str | None:
    """Return why the current device is no CUDA GPU of at least `capability`, or None."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return f"{what} needs a CUDA GPU"
    here = torch.cuda.get_device_capability()
    if here < capability:
        return (
            f"{what} needs compute capability {_dotted(capability)}, this GPU has {_dotted(here)}"
        )
    return None


@functools.cache
def needs_library(module: str, package: str) -> str | None:
    """Return what to install if `module` is not installed, or None."""
    parent, _, _ = module.partition(".")
    there = find_spec(parent) is not None and find_spec(module) is not None
    return None if there else f"needs {module}: pip install {package}"


def not_divisible(n: int, k: int, by: int, what: str) -> str | None:
    """Return why a kernel that needs `n` and `k` divisible by `by` does not fit, or None."""
    return f"{what} needs n and k divisible by {by}, not {n}x{k}" if n % by or k % by else None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
