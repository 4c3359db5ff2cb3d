"""Linears whose quantized weight is taken apart once, and not on every call.

The weight stays the module's parameter: a tensor subclass under its own name in the state dict. Calls go around it. An
eager call hands the stored tensor to its kernel, without PyTorch's search for an override. Compiled code sees plain
tensors: nothing is unwrapped or guarded on each call, and a CUDA graph copies no weight.

Weights that lie behind one another (`autoquant.candidates.joined`) are multiplied once for all linears that read the
same input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoquant.candidates.flat import Rebuild, flatten_tensor, unflatten_tensor
from autoquant.candidates.joined import Whole, whole_of
from autoquant.candidates.routed import RoutedWeight, multiply
from autoquant.records import content_key

_Kept = tuple[torch.Tensor, torch.Tensor, int]


def take_apart(module: nn.Module, *, any_subclass: bool = False) -> nn.Module:
    """Have linears computed from the tensors inside their quantized weight, in place.

    Only modules that compute as `nn.Linear` does are changed.

    Args:
        any_subclass: Also take weights apart that are other tensor subclasses than `RoutedWeight`.
    """
    wanted = torch.Tensor if any_subclass else RoutedWeight
    for owner in module.modules():
        if not _computes_as_linear(owner) or not isinstance(owner.weight, wanted):
            continue
        if is_traceable_wrapper_subclass(owner.weight):
            if not isinstance(owner, ApartLinear):
                owner.__class__ = _class_for(cast(type[nn.Linear], type(owner)))
            cast(ApartLinear, owner).take_apart()  # again too: the weight may have been replaced
    return module


def _computes_as_linear(owner: nn.Module) -> bool:
    """Check that a module is a linear with the usual forward pass."""
    return isinstance(owner, nn.Linear) and type(owner).forward in (nn.Linear.forward, ApartLinear.forward)


class Operand:
    """What linears of one whole are multiplied with: the tensors, and the product that was computed last.

    Attributes:
        make: Key of what the weight is made of and how it is multiplied, whatever its numbers.
        stored: The whole's stored tensor `[n, k]`, or None for a subclass that is not a `RoutedWeight`.
        parts: The plain tensors inside.
        rows: The whole's n.
    """

    def __init__(self, weight: torch.Tensor, whole: Whole) -> None:
        together = unflatten_tensor(whole.rebuild, list(whole.parts))
        code = weight.code_key() if isinstance(weight, RoutedWeight) else ""
        self.make = content_key([repr(whole.rebuild), code])
        self.stored = together.stored if isinstance(together, RoutedWeight) else None
        self.parts = list(whole.parts)
        self.product = _product(self.make, whole.rebuild)
        self.rows = together.shape[0]
        self._kept: _Kept | None = None
        self._keeps = True
        for part in self.parts:
            torch._dynamo.mark_static_address(part)

    def once(self, x: torch.Tensor, rows: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the product with `x`: the one kept for a sibling that read the same tensor, or a new one.

        It is kept until linears of all rows have had it.

        Args:
            rows: How many of the whole's rows the caller uses.
        """
        if not self._keeps:
            return compute()
        kept = self._kept
        if kept is None or kept[0] is not x:
            y, left = compute(), self.rows
            if kept is not None and torch.compiler.is_compiling():
                # A sibling reads something else: what is kept beyond a call would be compiled for anew by the next.
                self._keeps, self._kept = False, None
                return y
        else:
            _, y, left = kept
        self._kept = (x, y, left - rows) if left > rows else None
        return y


_operands: WeakValueDictionary[Any, Operand] = WeakValueDictionary()


def operand_of(weight: torch.Tensor) -> tuple[Operand, int]:
    """Return what a weight is multiplied as, shared with its siblings, and the weight's first row in it."""
    whole = whole_of(weight) if isinstance(weight, RoutedWeight) else None
    if whole is None:
        parts, rebuild = flatten_tensor(weight)
        whole = Whole(tuple(parts), rebuild, 0)
    places = tuple((part.data_ptr(), part.dtype, part.shape, part.stride(), part.device) for part in whole.parts)
    key = (repr(whole.rebuild), places)
    operand = _operands.get(key)
    if operand is None:
        operand = _operands[key] = Operand(weight, whole)
    return operand, whole.start


class ApartLinear(nn.Linear):
    """A linear that multiplies with the tensors inside its weight.

    Attributes:
        keeps: In compiled code, a product with its whole is kept for its siblings.
    """

    operand: Operand
    _start: int
    keeps: bool

    def take_apart(self) -> None:
        """Find what the weight is multiplied as."""
        self.operand, self._start = operand_of(self.weight)
        self.keeps = self.operand.rows > self.out_features

    def key(self) -> str:
        """Key of what the linear computes, whatever its numbers."""
        return content_key([self.operand.make, self._start, self.out_features])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operand = self.operand
        if torch.compiler.is_compiling():
            if operand.rows == self.out_features:
                return operand.product(x, self.bias, *operand.parts)
            y = operand.product(x, None, *operand.parts) if not self.keeps else self._once(x, _traced)
            return self._own_rows(y)
        weight = self._parameters["weight"]
        if torch._C._len_torch_function_stack() or not isinstance(weight, RoutedWeight):
            return F.linear(x, self.weight, self.bias)  # somebody watches, or this is a library's own tensor
        if operand.rows == self.out_features:
            return _eager(weight, operand, x, self.bias)
        return self._own_rows(self._once(x, _eager_whole, weight))

    def _once(self, x: torch.Tensor, compute: Callable[..., torch.Tensor], *first: torch.Tensor) -> torch.Tensor:
        operand = self.operand
        return operand.once(x, self.out_features, lambda: compute(*first, operand, x))

    def _own_rows(self, y: torch.Tensor) -> torch.Tensor:
        y = y.narrow(-1, self._start, self.out_features)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.take_apart()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("operand", "_start")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.take_apart()


class RoutedLinear(ApartLinear):
    """An `nn.Linear` whose quantized weight was taken apart."""


_classes: dict[type[nn.Linear], type[ApartLinear]] = {nn.Linear: RoutedLinear}


def _class_for(kind: type[nn.Linear]) -> type[ApartLinear]:
    if kind not in _classes:
        _classes[kind] = type(kind.__name__, (ApartLinear, kind), {"__module__": kind.__module__})
    return _classes[kind]


def _traced(operand: Operand, x: torch.Tensor) -> torch.Tensor:
    return operand.product(x, None, *operand.parts)


def _eager_whole(weight: RoutedWeight, operand: Operand, x: torch.Tensor) -> torch.Tensor:
    return _eager(weight, operand, x, None)


def _eager(weight: RoutedWeight, operand: Operand, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute with the weight's route as it is now, since a plan may be judged by other kernels than it is run by."""
    return multiply(x, weight, cast(torch.Tensor, operand.stored), bias)


_PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {}


def _product(make: str, rebuild: Rebuild) -> Callable[..., torch.Tensor]:
    """Return the function of x `[..., k]`, bias or None and the parts of a weight of this make to a linear's result.

    The compiler's first stage takes it as one function of plain tensors: it does not trace subclasses made on the way.
    The second looks into it. Both tell functions apart by their names alone, so the name says what it computes.
    """
    if make not in _PRODUCTS:

        def linear(x: torch.Tensor, bias: torch.Tensor | None, *parts: torch.Tensor) -> torch.Tensor:
            return F.linear(x, unflatten_tensor(rebuild, list(parts)), bias)

        linear.__name__ = linear.__qualname__ = f"linear_{make}"
        _PRODUCTS[make] = torch.compiler.allow_in_graph(linear)  # type: ignore[no-untyped-call]
    return _PRODUCTS[make]


def is_product(function: Any) -> bool:
    """Check whether a graph's function is the product of a linear that was taken apart."""
    return function in _PRODUCTS.values()
