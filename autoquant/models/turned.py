"""Turn linears of transformers that keep their weight as `[k, n]` into the usual `[n, k]`.

GPT-2 and its kin have `Conv1D` in place of `nn.Linear`: x @ weight + bias. All that knows linears
knows weights as `[n, k]`, kernels above all. So these modules are replaced where a model is loaded,
and where a plan or a checkpoint meets a module of a user's.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn


class TurnedLinear(nn.Linear):
    """A linear that was a `Conv1D`: its weight is the other way round in the model's own files."""


def is_conv1d(part: nn.Module) -> bool:
    """Check for transformers' `Conv1D`, without an import of transformers."""
    kind = type(part)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def turned_names(module: nn.Module) -> list[str]:
    """Return the names of the linears that were turned."""
    parts = module.named_modules(remove_duplicate=False)
    return [name for name, part in parts if isinstance(part, TurnedLinear)]


def turn_linears(module: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """Replace each `Conv1D` in place, one after the other. Others stay as they are.

    Args:
        names: Only those of these names; None for all.
    """
    made: dict[int, TurnedLinear] = {}
    found = [
        (name, part)
        for name, part in module.named_modules(remove_duplicate=False)
        if name and is_conv1d(part) and (names is None or name in names)
    ]
    for name, part in found:
        if id(part) not in made:
            made[id(part)] = _turned(part)
        module.set_submodule(name, made[id(part)])
    return module


def _turned(part: nn.Module) -> TurnedLinear:
    """Return the linear of a `Conv1D` with its bias, and its weight turned."""
    weight = part.get_parameter("weight")
    k, n = weight.shape
    linear = TurnedLinear(k, n, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(_other_way_round(weight.data), requires_grad=False)
    linear.bias = part.get_parameter("bias")
    return linear.train(part.training)


def _other_way_round(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous()
