"""Code that was compiled in this process, kept by what it was compiled from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

REGION_CLASSES: dict[tuple[type, str], type[nn.Module]] = {}
"""Classes of blocks that are nested regions, by the block's class and the make of its linears."""

FUNCTIONS: dict[str, Callable[..., Sequence[torch.Tensor]]] = {}
"""Compiled graphs, by a key of their code."""


def clear_caches() -> None:
    """Forget all that was compiled here, PyTorch's own caches included.

    Code that is in use stays.
    """
    torch.compiler.reset()
    REGION_CLASSES.clear()
    FUNCTIONS.clear()
