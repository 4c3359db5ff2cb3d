"""Find out whether a module with one matrix computes as a linear, by trying it.

It is tried with a small matrix of random numbers in place of its own. So it costs nothing, the
module may be on any device or without values, and a weight of zeros cannot hide what else it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates.calls import LinearCall, LinearHook
from autoquant.models.loaded import UNFIT

_N, _K = 12, 8
_ROWS = ((3,), (2, 3))
_SCALES = (1.0, 1e-3, 1e4)
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Form:
    """How a module keeps a linear.

    Attributes:
        weight: The name of its matrix.
        bias: The name of its vector, or None.
        turned: The matrix is `[k, n]`, not `[n, k]`.
    """

    weight: str
    bias: str | None
    turned: bool


def form_of(part: nn.Module) -> Form | None:
    """Return how a module keeps the linear that it computes.

    None if it computes anything else, or more, or does it by `F.linear` already.
    """
    kind = type(part)
    if kind.__module__.partition(".")[0] == "torch" or "forward" in vars(part):
        return None
    if part._modules or part._buffers or not _takes_one_tensor(kind):
        return None
    given = {name: value for name, value in part._parameters.items() if value is not None}
    matrices = [name for name, value in given.items() if value.ndim == 2]
    vectors = [name for name, value in given.items() if value.ndim == 1]
    if len(matrices) != 1 or len(vectors) > 1 or len(given) != 1 + len(vectors):
        return None
    if not given[matrices[0]].is_floating_point():
        return None
    bias = vectors[0] if vectors else None
    if bias is not None and given[bias].numel() not in given[matrices[0]].shape:
        return None
    for turned in (False, True):
        form = Form(matrices[0], bias, turned)
        with torch.no_grad():
            if _computes(part, form):
                return form
    return None


def _takes_one_tensor(kind: type[nn.Module]) -> bool:
    try:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 1 and parameters[0].kind in plain


def _computes(part: nn.Module, form: Form) -> bool:
    """Check that a module computes as a linear of a form does, in every dtype that it takes."""
    square = len(set(part.get_parameter(form.weight).shape)) == 1
    n, k = (_K, _K) if square else (_N, _K)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator)
    bias = None if form.bias is None else torch.randn(n, generator=generator)
    exact = _stand_in(part, form, weight, bias)
    tried = [_agrees(exact, form, x) for x in _inputs(k, generator)]
    if False in tried or True not in tried:
        return False
    rounded = _stand_in(part, form, weight.bfloat16(), None if bias is None else bias.bfloat16())
    y = _tried(rounded, torch.ones(2, 3, k, dtype=torch.bfloat16))
    casts = _tried(exact, torch.ones(2, 3, k, dtype=torch.bfloat16)) is not None
    return isinstance(y, torch.Tensor) and y.dtype == torch.bfloat16 and not casts


def _agrees(part: nn.Module, form: Form, x: torch.Tensor) -> bool | None:
    """Check a module's output against the linear's; None if it does not take the input."""
    weight = part.get_parameter(form.weight)
    with _OwnCalls(weight) as watch:
        y = _tried(part, x)
    if y is None:
        return None
    bias = None if form.bias is None else part.get_parameter(form.bias)
    right = F.linear(x, weight.t() if form.turned else weight, bias)
    if watch.seen or not isinstance(y, torch.Tensor) or y.shape != right.shape:
        return False
    return y.dtype == right.dtype and bool((y - right).norm() <= _TOLERANCE * right.norm())


def _tried(part: nn.Module, x: torch.Tensor) -> Any:
    """Return what a module computes, without its hooks; None if it fails."""
    with suppress(*UNFIT):
        return type(part).forward(part, x)
    return None


def _inputs(k: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for rows in _ROWS:
        for scale in _SCALES:
            yield scale * torch.randn(*rows, k, generator=generator)


def _stand_in(
    part: nn.Module, form: Form, weight: torch.Tensor, bias: torch.Tensor | None
) -> nn.Module:
    """Return a module of the same class and settings with other parameters."""
    own = part.get_parameter(form.weight).shape
    n, k = reversed(own) if form.turned else own
    sizes = {k: weight.shape[1]} | {n: weight.shape[0]}
    made = type(part).__new__(type(part))
    vars(made).update(vars(part))
    for name, value in vars(part).items():
        if type(value) is int and value in sizes:
            vars(made)[name] = sizes[value]
    kept = {form.weight: weight.t().contiguous() if form.turned else weight}
    if form.bias is not None and bias is not None:
        kept[form.bias] = bias
    vars(made)["_parameters"] = dict.fromkeys(part._parameters) | {
        name: nn.Parameter(value, requires_grad=False) for name, value in kept.items()
    }
    return made


class _OwnCalls(LinearHook):
    """Notes whether a weight itself is the weight of a linear call."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.seen = False
        self._weight = weight

    def on_linear(self, call: LinearCall) -> None:
        self.seen = self.seen or call.weight is self._weight
