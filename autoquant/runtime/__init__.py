"""What runs a loaded model."""

from __future__ import annotations

from torch import nn


def prepare(model: nn.Module) -> nn.Module:
    """Make a loaded model ready to run, in place.

    Returns:
        The same module.
    """
    return model
