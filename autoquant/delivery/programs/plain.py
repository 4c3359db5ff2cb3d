"""Modules whose quantized weights are plain tensors, which is what a program can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoquant.candidates.flat import Rebuild, flatten_tensor, unflatten_tensor
from autoquant.candidates.joined import Whole, whole_of
from autoquant.candidates.linears import ApartLinear
from autoquant.candidates.routed import RoutedWeight, multiply
from autoquant.models.copies import shallow_copy


class _Last:
    """The last input of a product and its result, where a trace does not look for tensors."""

    x: torch.Tensor | None = None
    y: torch.Tensor | None = None


class Product(nn.Module):
    """Multiplies with the plain tensors of one weight, or of several that lie side by side.

    Its tensors are buffers `part0`, `part1`, ...
    """

    def __init__(self, whole: Whole) -> None:
        super().__init__()
        self._rebuild: Rebuild = whole.rebuild
        self._names = [f"part{number}" for number in range(len(whole.parts))]
        for name, part in zip(self._names, whole.parts, strict=True):
            self.register_buffer(name, part)
        self._last = _Last()

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        parts = [self.get_buffer(name) for name in self._names]
        weight = cast(RoutedWeight, unflatten_tensor(self._rebuild, parts))
        # As one matrix: a stack of matrices would be multiplied one by one.
        y = multiply(x.reshape(-1, x.shape[-1]), weight, weight.stored, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def once(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product without a bias, the same tensor for all linears that read `x`."""
        last = self._last
        if last.x is not x or last.y is None:
            last.x, last.y = x, self(x, None)
        return last.y


class PlainLinear(nn.Module):
    """A linear whose weight is, or is a part of, the weight of a `Product`.

    Args:
        start: First row of the weight in that of the product.
        rows: How many rows the weight has, or None for all.
    """

    def __init__(
        self, product: Product, bias: nn.Parameter | None, start: int, rows: int | None
    ) -> None:
        super().__init__()
        self.product = product
        self.bias = bias
        self._start, self._rows = start, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._rows is None:
            return cast(torch.Tensor, self.product(x, self.bias))
        y = self.product.once(x).narrow(-1, self._start, self._rows)
        return y if self.bias is None else y + self.bias


def plain_copy(module: nn.Module, kernels: Mapping[str, str]) -> nn.Module:
    """Return a copy of a quantized module that holds plain tensors only, and shares them.

    Args:
        kernels: The one kernel of each quantized weight, by the weight's name.
    """
    copied = shallow_copy(module)
    products: dict[Any, Product] = {}
    for name, owner in list(copied.named_modules()):
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is None or not isinstance(parameter.data, RoutedWeight):
                continue
            full = f"{name}.{leaf}" if name else leaf
            owner._parameters[leaf] = nn.Parameter(
                with_kernel(parameter.data, kernels[full]), requires_grad=False
            )
        if _is_linear(owner):
            copied = _replaced(copied, name, _linear(cast(nn.Linear, owner), products))
    return _unwrapped(copied)


def with_kernel(weight: RoutedWeight, kernel: str) -> RoutedWeight:
    """Return the weight with one kernel for any number of rows."""
    return RoutedWeight(weight.stored, weight.format_id, ((None, kernel),), weight.compute_dtype)


def routed_weights(module: nn.Module) -> dict[str, RoutedWeight]:
    """Return the quantized weights of a module by name."""
    return {
        name: parameter.data
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if isinstance(parameter.data, RoutedWeight)
    }


def _is_linear(owner: nn.Module) -> bool:
    return (
        isinstance(owner, nn.Linear)
        and type(owner).forward in (nn.Linear.forward, ApartLinear.forward)
        and isinstance(owner.weight.data, RoutedWeight)
    )


def _linear(owner: nn.Linear, products: dict[Any, Product]) -> PlainLinear:
    weight = owner.weight.data
    whole = whole_of(cast(RoutedWeight, weight))
    if whole is None:
        parts, rebuild = flatten_tensor(weight)
        return PlainLinear(Product(Whole(tuple(parts), rebuild, 0)), owner.bias, 0, None)
    key = (repr(whole.rebuild), *((part.data_ptr(), part.shape) for part in whole.parts))
    product = products.setdefault(key, Product(whole))
    return PlainLinear(product, owner.bias, whole.start, weight.shape[0])


def _replaced(root: nn.Module, name: str, part: nn.Module) -> nn.Module:
    if not name:
        return part
    root.set_submodule(name, part)
    return root


def _unwrapped(module: nn.Module) -> nn.Module:
    """Unwrap weights of modules that are no linears, such as routers of experts."""
    from torch._functorch._aot_autograd.subclass_parametrization import (
        unwrap_tensor_subclass_parameters,
    )

    if any(is_traceable_wrapper_subclass(each) for each in module.parameters()):
        unwrap_tensor_subclass_parameters(module)
    return module
