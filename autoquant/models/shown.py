"""Show the linears that models keep under other names: as modules that call `F.linear`.

It is done where a model is loaded, on a copy of a user's own, and where a plan or a checkpoint
meets a module: there only for the linears that these name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from autoquant.models.attention import open_attentions, opened_names, part_crossed, parted_weight
from autoquant.models.copies import not_compiled
from autoquant.models.folded import fold_weights, folded_names, folded_weight
from autoquant.models.pointwise import (
    pointwise_names,
    pointwise_weight,
    show_pointwise,
    with_channels_last,
)
from autoquant.models.streaming import stream_of
from autoquant.models.turned import make_plain, plain_names, plain_weight


def show_linears(module: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """Change modules that hide a linear, in place. What the model computes stays the same.

    Weights of a streamed model stay as its files have them. How attentions and convolutions of one
    point are shown depends on what they get: see `show_as_run`.

    Args:
        names: Only linears whose module or weight has one of these names; None for all.
    """
    is_streamed = stream_of(module) is not None
    make_plain(module, names, turn=not is_streamed)
    if not is_streamed:
        fold_weights(module, names)
        show_pointwise(module, names or ())
        open_attentions(module, names)
    return module


def show_as_run(module: nn.Module, run: Callable[[], Any]) -> None:
    """Show linears, after `show_linears`, by what their modules get in one forward pass.

    Args:
        run: Makes the forward pass. It may fail.
    """
    part_crossed(module, run)
    show_pointwise(module, with_channels_last(module, run))


def shown_names(module: nn.Module) -> list[str]:
    """Return the names of the linears that were shown, for `show_linears` on another module."""
    kinds = (plain_names, folded_names, pointwise_names, opened_names)
    return [name for names in kinds for name in names(module)]


def shown_weight(module: nn.Module, name: str) -> torch.Tensor | None:
    """Return a parameter as it is once linears are shown, or None. Nothing is changed."""
    owner, _, leaf = name.rpartition(".")
    try:
        part = not_compiled(module.get_submodule(owner))
    except AttributeError:
        return None
    for weight in (pointwise_weight, plain_weight, parted_weight, folded_weight):
        if (found := weight(part, leaf)) is not None:
            return found
    return None
