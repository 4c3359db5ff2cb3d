"""Fold what makes the weight of a linear anew in each call: weight norm, pruning, parametrizations.

In eval mode these make the same weight each time. Folded, it is a parameter like any other.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_NAMES = ("weight", "bias")
_Hooks = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


class FoldedLinear(nn.Linear):
    """A linear whose weight was made anew in each call."""


def fold_weights(module: nn.Module, names: Collection[str] | None = None) -> None:
    """Fold weights of linears in place. Others stay as they are.

    Args:
        names: Only linears of these names; None for all.
    """
    for name, part in list(module.named_modules()):
        if (names is None or name in names) and _makes_weight(part):
            _fold(part)


def folded_names(module: nn.Module) -> list[str]:
    """Return the names of linears whose weights were folded."""
    parts = module.named_modules(remove_duplicate=False)
    return [name for name, part in parts if isinstance(part, FoldedLinear)]


def folded_weight(part: nn.Module, leaf: str) -> torch.Tensor | None:
    """Return the weight that a linear would have if it were folded, or None."""
    if leaf not in _NAMES or not _makes_weight(part):
        return None
    made: torch.Tensor = getattr(part, leaf)
    return made


def _makes_weight(part: nn.Module) -> bool:
    """Check for a linear, with no other forward pass, whose weight is no parameter."""
    if not isinstance(part, nn.Linear) or type(part).forward is not nn.Linear.forward:
        return False
    if parametrize.is_parametrized(part, "weight"):
        return _is_constant(part)
    return "weight" not in part._parameters and bool(_hooks(part))


def _is_constant(part: nn.Linear) -> bool:
    with torch.no_grad():
        return torch.equal(part.weight, part.weight)


def _hooks(part: nn.Module) -> list[Any]:
    return [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, _Hooks)]


def _fold(part: Any) -> None:
    for hook in _hooks(part):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(part, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(part, hook.name)
        else:
            prune.remove(part, hook._tensor_name)  # type: ignore[no-untyped-call]
    # PyTorch's own removal would change the class of a parametrized linear, which copies share.
    values = {name: getattr(part, name) for name in _NAMES}
    part._modules.pop("parametrizations", None)
    part.__class__ = FoldedLinear
    for name, value in values.items():
        if name not in part._parameters:
            kept = value.detach().contiguous()
            part.register_parameter(name, nn.Parameter(kept, requires_grad=False))
