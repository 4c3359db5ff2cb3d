"""Show convolutions of one point as the linears that they are, where the channels come last.

Such a convolution multiplies the channels of each point with one matrix. With channels that come
first, moving them takes longer than the product may save (`studies/models/linears`), so it goes on
as PyTorch's own. So it does where nobody looks and its weight is not quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import has_torch_function

from autoquant.models.loaded import UNFIT


class PointwiseConv(nn.Conv2d):
    """A convolution of one point. Its weight is `[n, k]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the convolution of x `[..., k, height, width]`: `[..., n, height, width]`."""
        weight: torch.Tensor = self.weight
        if type(weight) is nn.Parameter and not self._is_watched():
            convolved: torch.Tensor = self._conv_forward(x, weight[:, :, None, None], self.bias)
            return convolved
        last = x.movedim(-3, -1)
        y = F.linear(last, weight, self.bias).movedim(-1, -3)
        return y if last.is_contiguous() else y.contiguous()

    def _is_watched(self) -> bool:
        return not torch.compiler.is_compiling() and has_torch_function((self.weight,))


def with_channels_last(module: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Return the names of convolutions of one point that only get inputs with the channels last.

    Args:
        run: Makes one forward pass. If it fails, there are none.
    """
    found = {part: name for name, part in module.named_modules() if _is_pointwise(part)}
    if not found:
        return []
    seen: set[nn.Module] = set()
    first: set[nn.Module] = set()

    def note(part: nn.Module, args: tuple[Any, ...]) -> None:
        last = bool(args) and args[0].movedim(-3, -1).is_contiguous()
        (seen if last else first).add(part)

    handles = [part.register_forward_pre_hook(note) for part in found]
    try:
        run()
    except UNFIT:
        seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [name for part, name in found.items() if part in seen - first]


def show_pointwise(module: nn.Module, names: Collection[str]) -> None:
    """Give convolutions of one point a weight `[n, k]`, in place. Others stay as they are.

    Args:
        names: Of the convolutions.
    """
    shown: dict[int, nn.Parameter] = {}
    for name, part in module.named_modules():
        if name in names and _is_pointwise(part):
            weight = part.get_parameter("weight")
            if id(weight) not in shown:
                shown[id(weight)] = nn.Parameter(weight.data.flatten(1), requires_grad=False)
            part._parameters["weight"] = shown[id(weight)]
            part.__class__ = PointwiseConv


def pointwise_names(module: nn.Module) -> list[str]:
    """Return the names of convolutions that are shown."""
    parts = module.named_modules(remove_duplicate=False)
    return [name for name, part in parts if isinstance(part, PointwiseConv)]


def pointwise_weight(part: nn.Module, leaf: str) -> torch.Tensor | None:
    """Return the weight `[n, k]` that a convolution of one point would have, or None."""
    if leaf != "weight" or not _is_pointwise(part):
        return None
    return part.get_parameter("weight").data.flatten(1)


def _is_pointwise(part: nn.Module) -> bool:
    if type(part) is not nn.Conv2d or "forward" in vars(part) or "weight" not in part._parameters:
        return False
    is_padded = part.padding not in ("valid", "same") and any(part.padding)
    return {*part.kernel_size, *part.stride, part.groups} == {1} and not is_padded
