"""Show convolutions of one point as the linears that they are.

Such a convolution multiplies the channels of each point with one matrix. It goes on as PyTorch's
own where nobody looks and its weight is not quantized. As a linear it has the channels last: where
they are first, they are moved there and back (`studies/models/linears` has what that costs).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import has_torch_function


class _Pointwise(nn.Module):
    """What convolutions of one point share. The weight is `[n, k]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the convolution of x `[..., k, *points]`: `[..., n, *points]`."""
        weight, bias = self.get_parameter("weight"), self._parameters["bias"]
        ones = len(self.kernel_size)  # type: ignore[arg-type]
        quantized = type(weight) is not nn.Parameter
        if not quantized and (torch.compiler.is_compiling() or not has_torch_function((weight,))):
            as_stored = weight.view(*weight.shape, *([1] * ones))
            convolved: torch.Tensor = self._conv_forward(x, as_stored, bias)  # type: ignore[operator]
            return convolved
        channels = -1 - ones
        y = F.linear(x.movedim(channels, -1), weight, bias).movedim(-1, channels)
        return y.contiguous() if x.is_contiguous() else y


class PointwiseConv1d(_Pointwise, nn.Conv1d):
    """An `nn.Conv1d` of one point."""


class PointwiseConv2d(_Pointwise, nn.Conv2d):
    """An `nn.Conv2d` of one point."""


_KINDS: dict[type[nn.Module], type[_Pointwise]] = {
    nn.Conv1d: PointwiseConv1d,
    nn.Conv2d: PointwiseConv2d,
}


def show_pointwise(module: nn.Module, names: Collection[str] | None = None) -> None:
    """Give each convolution of one point a weight `[n, k]`, in place. Others stay as they are.

    Args:
        names: Only those of these names; None for all.
    """
    shown: dict[int, nn.Parameter] = {}
    for name, part in module.named_modules():
        if (names is None or name in names) and _is_pointwise(part):
            weight = part.get_parameter("weight")
            if id(weight) not in shown:
                shown[id(weight)] = nn.Parameter(weight.data.flatten(1), requires_grad=False)
            part._parameters["weight"] = shown[id(weight)]
            part.__class__ = _KINDS[type(part)]


def pointwise_names(module: nn.Module) -> list[str]:
    """Return the names of convolutions that are shown."""
    parts = module.named_modules(remove_duplicate=False)
    return [name for name, part in parts if isinstance(part, _Pointwise)]


def pointwise_weight(part: nn.Module, leaf: str) -> torch.Tensor | None:
    """Return the weight `[n, k]` that a convolution of one point would have, or None."""
    if leaf != "weight" or not _is_pointwise(part):
        return None
    return part.get_parameter("weight").data.flatten(1)


def _is_pointwise(part: nn.Module) -> bool:
    if type(part) not in _KINDS or "forward" in vars(part) or "weight" not in part._parameters:
        return False
    assert isinstance(part, (nn.Conv1d, nn.Conv2d))
    is_padded = part.padding not in ("valid", "same") and any(part.padding)
    return {*part.kernel_size, *part.stride, part.groups} == {1} and not is_padded
