"""Make plain linears of modules that compute as one by code of their own.

GPT-2 and its kin have `Conv1D` in place of `nn.Linear`: x @ weight + bias, with a weight `[k, n]`.
Falcon's linears write x @ weight.T, and so do linears of users. All that knows linears knows calls
of `F.linear` and weights `[n, k]`, kernels above all. So these modules are changed where a model is
loaded, and where a plan or a checkpoint meets a module of a user's. What a module computes decides,
and not its name (see `autoquant.models.probing`).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.models.probing import Form, form_of


class PlainLinear(nn.Linear):
    """A linear that computed the same by other calls than `F.linear`."""


class TurnedLinear(PlainLinear):
    """A linear whose weight is the other way round in the model's own files, e.g. `Conv1D`'s."""


class PlainMatrix(nn.Module):
    """A linear whose parameters have names of their own."""

    _form: Form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product `[..., n]`."""
        bias = None if self._form.bias is None else self._parameters[self._form.bias]
        return F.linear(x, self.get_parameter(self._form.weight), bias)


class TurnedMatrix(PlainMatrix):
    """One whose weight is the other way round in the model's own files."""


_TURNED = (TurnedLinear, TurnedMatrix)


def turned_names(module: nn.Module) -> list[str]:
    """Return the names of the linears that were turned."""
    return _names(module, _TURNED)


def plain_names(module: nn.Module) -> list[str]:
    """Return the names of the linears that were made plain, turned or not."""
    return _names(module, (PlainLinear, PlainMatrix))


def _names(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    parts = module.named_modules(remove_duplicate=False)
    return [name for name, part in parts if isinstance(part, kinds)]


def make_plain(
    module: nn.Module, names: Collection[str] | None = None, *, turn: bool = True
) -> None:
    """Make linears plain in place, with their hooks and names. Others stay as they are.

    Args:
        names: Only those of these names; None for all.
        turn: Also those whose weights have to be turned, in new memory.
    """
    turned: dict[int, nn.Parameter] = {}
    found = [
        (part, form)
        for name, part in module.named_modules()
        if name and (names is None or name in names) and (form := form_of(part)) is not None
    ]
    for part, form in found:
        if turn or not form.turned:
            _become_plain(part, form, turned)


def plain_weight(part: nn.Module, leaf: str) -> torch.Tensor | None:
    """Return a parameter as it would be if its module were plain, or None if there is none."""
    parameter = part._parameters.get(leaf)
    if parameter is None or parameter.ndim != 2 or not is_turned(part):
        return parameter
    return parameter.data.t()


def is_turned(part: nn.Module) -> bool:
    """Check whether a module computes as a linear whose weight is the other way round."""
    form = form_of(part)
    return form is not None and form.turned


def _become_plain(part: nn.Module, form: Form, turned: dict[int, nn.Parameter]) -> None:
    weight = part.get_parameter(form.weight)
    if form.turned:
        if id(weight) not in turned:
            turned[id(weight)] = nn.Parameter(_other_way_round(weight.data), requires_grad=False)
        part._parameters[form.weight] = weight = turned[id(weight)]
    if form.weight == "weight" and form.bias in (None, "bias"):
        part.__class__ = TurnedLinear if form.turned else PlainLinear
        part._parameters.setdefault("bias", None)
        part.out_features, part.in_features = weight.shape  # type: ignore[assignment]
    else:
        part.__class__ = TurnedMatrix if form.turned else PlainMatrix
        part._form = form  # type: ignore[assignment]


def _other_way_round(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous()
