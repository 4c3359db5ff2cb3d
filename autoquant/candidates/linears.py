"""Take the quantized weight of a linear apart once, and not on every call.

The weight stays the module's parameter: a tensor subclass under its own name in the state dict.
Calls bypass it. An eager call passes the stored tensor to its kernel, without PyTorch's search for
an override. Compiled code sees plain tensors: no call unwraps or guards anything, and a CUDA graph
copies no weight.

Adjacent weights (`autoquant.candidates.joined`) are multiplied once for all linears that read the
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

from autoquant.candidates.apart import Apart
from autoquant.candidates.apart_experts import take_experts_apart
from autoquant.candidates.flat import Rebuild, flatten_tensor, unflatten_tensor
from autoquant.candidates.joined import Whole, whole_of
from autoquant.candidates.lookups import take_embedding_apart
from autoquant.candidates.routed import RoutedWeight, multiply
from autoquant.records import content_key

_Kept = tuple[torch.Tensor, torch.Tensor, int]


def take_apart(module: nn.Module, *, any_subclass: bool = False) -> nn.Module:
    """Make linears compute from the tensors inside their quantized weight, in place.

    Only modules with the forward pass of `nn.Linear`, experts of transformers and embeddings are
    changed.

    Args:
        any_subclass: Take apart every tensor subclass, not only `RoutedWeight`.
    """
    wanted = torch.Tensor if any_subclass else RoutedWeight
    for owner in module.modules():
        take_experts_apart(owner)
        take_embedding_apart(owner)
        if not _computes_as_linear(owner) or not isinstance(owner.weight, wanted):
            continue
        if is_traceable_wrapper_subclass(owner.weight):
            if not isinstance(owner, ApartLinear):
                owner.__class__ = _class_for(cast(type[nn.Linear], type(owner)))
            cast(ApartLinear, owner).take_apart()  # again, too: the weight may have been replaced
    return module


def _computes_as_linear(owner: nn.Module) -> bool:
    """Check that a module is a linear with the usual forward pass."""
    return isinstance(owner, nn.Linear) and type(owner).forward in (
        nn.Linear.forward,
        ApartLinear.forward,
    )


class Operand:
    """The tensors that the linears of one whole multiply with, and their last product.

    Attributes:
        make: Key of the weight's type, shape and kernels. It does not depend on the numbers.
        stored: The whole's stored tensor `[n, k]`, or None if it is not a `RoutedWeight`.
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
        """Return the whole's product with `x`, computed once for all its linears.

        It is kept until linears of all rows have asked for it.

        Args:
            rows: The number of the whole's rows that the caller uses.
            compute: Function that returns the product.
        """
        if not self._keeps:
            return compute()
        kept = self._kept
        if kept is None or kept[0] is not x:
            y, left = compute(), self.rows
            if kept is not None and torch.compiler.is_compiling():
                # A sibling reads another tensor. A product kept after this call would make the next
                # one compile again.
                self._keeps, self._kept = False, None
                return y
        else:
            _, y, left = kept
        self._kept = (x, y, left - rows) if left > rows else None
        return y


_operands: WeakValueDictionary[Any, Operand] = WeakValueDictionary()


def operand_of(weight: torch.Tensor) -> tuple[Operand, int]:
    """Return the operand of a weight and the weight's first row in it.

    Siblings share one operand.
    """
    whole = whole_of(weight) if isinstance(weight, RoutedWeight) else None
    if whole is None:
        parts, rebuild = flatten_tensor(weight)
        whole = Whole(tuple(parts), rebuild, 0)
    key = (repr(whole.rebuild), tuple(_memory(part) for part in whole.parts))
    operand = _operands.get(key)
    if operand is None:
        operand = _operands[key] = Operand(weight, whole)
    return operand, whole.start


def _memory(part: torch.Tensor) -> tuple[object, ...]:
    """Return a key of the memory that a plain tensor views."""
    return part.data_ptr(), part.dtype, part.shape, part.stride(), part.device


class ApartLinear(Apart, nn.Linear):
    """A linear that multiplies with the tensors inside its weight.

    Attributes:
        operand: The operand of its weight.
        keeps: Compiled code keeps the product with the whole for the linear's siblings.
    """

    found_again = ("operand", "_start")

    operand: Operand
    _start: int
    keeps: bool

    def take_apart(self) -> None:
        """Find the weight's operand."""
        self.operand, self._start = operand_of(self.weight)
        self.keeps = self.operand.rows > self.out_features

    def key(self) -> str:
        """Return a key of the linear's computation. It does not depend on the numbers."""
        return content_key([self.operand.make, self._start, self.out_features])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operand = self.operand
        if torch.compiler.is_compiling():
            if operand.rows == self.out_features:
                return operand.product(x, self.bias, *operand.parts)
            return self._own_rows(self._once(x, _traced) if self.keeps else _traced(operand, x))
        weight = self._parameters["weight"]
        if torch._C._len_torch_function_stack() or not isinstance(weight, RoutedWeight):
            # A function mode watches, or the weight is a library's own tensor.
            return F.linear(x, self.weight, self.bias)
        if operand.rows == self.out_features:
            return _eager(weight, operand, x, self.bias)
        return self._own_rows(self._once(x, _eager_whole, weight))

    def _once(
        self, x: torch.Tensor, compute: Callable[..., torch.Tensor], *first: torch.Tensor
    ) -> torch.Tensor:
        """Return the product with the whole: `compute(*first, operand, x)`, or the one kept."""
        operand = self.operand
        return operand.once(x, self.out_features, lambda: compute(*first, operand, x))

    def _own_rows(self, y: torch.Tensor) -> torch.Tensor:
        y = y.narrow(-1, self._start, self.out_features)
        return y if self.bias is None else y + self.bias


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


def _eager(
    weight: RoutedWeight, operand: Operand, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute with the weight's present route: quality may be measured with other kernels."""
    return multiply(x, weight, cast(torch.Tensor, operand.stored), bias)


_PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {}


def _product(make: str, rebuild: Rebuild) -> Callable[..., torch.Tensor]:
    """Return the linear function for weights of one make.

    It takes x `[..., k]`, a bias `[n]` or None, and the plain tensors of the weight. The compiler's
    first stage does not look into it, since it cannot trace subclasses made on the way. The second
    stage does. Both identify functions by their names alone, so the name contains the make.
    """
    if make not in _PRODUCTS:

        def linear(
            x: torch.Tensor, bias: torch.Tensor | None, *parts: torch.Tensor
        ) -> torch.Tensor:
            return F.linear(x, unflatten_tensor(rebuild, list(parts)), bias)

        linear.__name__ = linear.__qualname__ = f"linear_{make}"
        _PRODUCTS[make] = torch.compiler.allow_in_graph(linear)  # type: ignore[no-untyped-call]
    return _PRODUCTS[make]


def is_product(function: Any) -> bool:
    """Check whether a graph's function is the product of a linear that was taken apart."""
    return function in _PRODUCTS.values()
