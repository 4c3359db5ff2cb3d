"""Weights of experts: matrices of one size in one parameter, each multiplied with rows of its own.

A mixture of experts keeps the weights of a layer's experts as one parameter `[experts, n, k]`, and
calls PyTorch's `grouped_mm` with rows that are sorted by their expert. A quantized one is stored as
the linear `[experts * n, k]` that its matrices make one above the other. So a format can hold it if
its tensors lie row by row, and each expert is computed by the kernels for a linear of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from autoquant.candidates.base import Format, Kernel
from autoquant.candidates.calls import GROUPED_FUNCTIONS, expert_rows, grouped_arguments
from autoquant.candidates.flat import Rebuild, flatten_tensor, unflatten_tensor
from autoquant.candidates.inputs import InputStatistics
from autoquant.candidates.joined import stack_rows, with_rows
from autoquant.candidates.registry import get_format
from autoquant.candidates.routed import (
    RouteAttribute,
    RoutedWeight,
    kernel_for_rows,
    multiply,
)
from autoquant.records import Route, content_key

_ONE_BY_ONE = ("cpu", "meta")
"""Kinds of device that compute experts one by one: there the host knows which rows are whose."""


def cannot_hold_experts(fmt: Format, device_type: str) -> str:
    """Return why a format cannot hold experts on a device, or an empty string."""
    if fmt.input_kept is not None:
        return "what it keeps is of one input, and each expert reads its own"
    if not (fmt.joins or fmt.tensor_type is torch.Tensor):
        return "its tensors do not lie row by row, so it cannot hold experts"
    if any(multiplies_experts(kernel, device_type) for kernel in fmt.kernels):
        return ""
    return "none of its kernels multiplies the rows of several experts at once"


def multiplies_experts(kernel: Kernel, device_type: str) -> bool:
    """Check that a kernel can multiply each row with its own expert on a device."""
    return not computes_at_once(device_type) or kernel.grouped is not None


def computes_at_once(device_type: str) -> bool:
    """Check whether one kernel computes all experts of a layer on a device."""
    return device_type not in _ONE_BY_ONE


class ExpertInputs:
    """Statistics of the inputs of a layer's experts.

    Attributes:
        each: By expert; None for one that no row reached.
        turned: The parameter is `[experts, k, n]`.
    """

    def __init__(self, each: list[InputStatistics | None], turned: bool) -> None:
        self.each, self.turned = each, turned

    @property
    def idle(self) -> list[int]:
        """Numbers of the experts that no row reached."""
        return [number for number, inputs in enumerate(self.each) if inputs is None]


def store_for_inputs(fmt: Format, weight: torch.Tensor, inputs: ExpertInputs) -> torch.Tensor:
    """Round each expert's weight for its own inputs; an idle one to nearest.

    Args:
        weight: The parameter, as it is kept.

    Returns:
        The format's tensor `[experts * n, k]`.
    """
    nearest = get_format(fmt.rounds)
    straight = weight.transpose(-2, -1) if inputs.turned else weight
    stored = [
        nearest.store(own) if read is None else fmt.store(own, read)
        for own, read in zip(straight, inputs.each, strict=True)
    ]
    return stack_rows(stored)


class ExpertsWeight(RoutedWeight):
    """The quantized weights of experts `[experts, n, k]`.

    Tensor attributes:
        stored: The format's tensor `[experts * n, k]`.

    Other attributes:
        experts: How many there are.
        turned: It shows the shape `[experts, k, n]`, as `transpose(-2, -1)` returns it.
        untransposed: What it is the transpose of, if `transpose` returned it, or None.
    """

    untransposed: ExpertsWeight | None = None

    tensor_attribute_names = [*RoutedWeight.tensor_attribute_names, "experts", "turned"]  # noqa: RUF012

    def __new__(
        cls,
        stored: torch.Tensor,
        format_id: str,
        route: RouteAttribute,
        compute_dtype: torch.dtype,
        experts: int,
        turned: bool = False,
    ) -> ExpertsWeight:
        rows, k = stored.shape
        size = (experts, k, rows // experts) if turned else (experts, rows // experts, k)
        return torch.Tensor._make_wrapper_subclass(
            cls, size, dtype=compute_dtype, device=stored.device, requires_grad=False
        )

    def __init__(
        self,
        stored: torch.Tensor,
        format_id: str,
        route: RouteAttribute,
        compute_dtype: torch.dtype,
        experts: int,
        turned: bool = False,
    ) -> None:
        super().__init__(stored, format_id, route, compute_dtype)
        self.experts = experts
        self.turned = turned

    @classmethod
    def of(
        cls,
        stored: torch.Tensor,
        fmt: Format,
        route: Route,
        dtype: torch.dtype,
        experts: int,
        turned: bool = False,
    ) -> ExpertsWeight:
        """Put a route around the stored tensor `[experts * n, k]` of a format."""
        steps = tuple((step.upper_m, step.kernel) for step in route)
        return cls(stored, fmt.id, steps, dtype, experts, turned)

    def turn(self) -> ExpertsWeight:
        """Return the same weights, with the last two dimensions in the other order."""
        turned = ExpertsWeight(
            self.stored,
            self.format_id,
            self.route,
            self.compute_dtype,
            self.experts,
            not self.turned,
        )
        turned.untransposed = self
        return turned

    def expert(self, number: int) -> RoutedWeight:
        """Return the weight `[n, k]` of one expert, in the same memory."""
        parts, rebuild = flatten_tensor(self.stored)
        stored = _expert(parts, rebuild, number, self.experts)
        return RoutedWeight(stored, self.format_id, self.route, self.compute_dtype)

    def dequantize(self) -> torch.Tensor:
        """Return the float32 numbers that the weights store, in the shape that they show."""
        rows, k = self.stored.shape
        numbers = super().dequantize().view(self.experts, rows // self.experts, k)
        return numbers.transpose(-2, -1) if self.turned else numbers


def _expert(
    parts: Sequence[torch.Tensor], rebuild: Rebuild, number: int, experts: int
) -> torch.Tensor:
    """Return one expert's part of a stored tensor."""
    total = len(parts[0])  # as many in each: they lie row by row
    rows = total // experts
    own = [part.narrow(0, number * rows, rows) for part in parts]
    return unflatten_tensor(with_rows(rebuild, total, rows), own)


class ExpertsOperand:
    """The tensors inside the weights of experts, and their products.

    Attributes:
        make: Key of their type, shape and kernels. It does not depend on the numbers.
        parts: The plain tensors inside.
    """

    def __init__(self, weight: ExpertsWeight) -> None:
        self.parts, rebuild = flatten_tensor(weight)
        self.make = content_key([repr(rebuild), weight.code_key()])
        rows, k = weight.stored.shape
        _MAKES[self.make] = rebuild, rows // weight.experts, k
        for part in self.parts:
            torch._dynamo.mark_static_address(part)

    def product(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Return x `[rows, k]`, sorted by expert, times each expert's weight: `[rows, n]`."""
        grouped = torch.ops.autoquant.grouped_product
        return cast(torch.Tensor, grouped(x, ends, self.parts, self.make))


_MAKES: dict[str, tuple[Rebuild, int, int]] = {}
"""How to rebuild weights of one make, each expert's n, and k."""


@torch.library.custom_op("autoquant::grouped_product", mutates_args=())
def _grouped_product(
    x: torch.Tensor, ends: torch.Tensor, parts: list[torch.Tensor], make: str
) -> torch.Tensor:
    weight = cast(ExpertsWeight, unflatten_tensor(_MAKES[make][0], parts))
    return multiply_experts(x, weight, ends)


@_grouped_product.register_fake
def _(x: torch.Tensor, ends: torch.Tensor, parts: list[torch.Tensor], make: str) -> torch.Tensor:
    return x.new_empty(x.shape[0], _MAKES[make][1])


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _x, ends, parts, ctx.make = inputs
    ctx.save_for_backward(ends, *parts)


def _gradient(ctx: Any, of_y: torch.Tensor) -> tuple[torch.Tensor, None, list[None], None]:
    ends, *parts = ctx.saved_tensors
    back = torch.ops.autoquant.grouped_product_back
    return back(of_y, ends, parts, ctx.make), None, [None] * len(parts), None


_grouped_product.register_autograd(_gradient, setup_context=_keep_for_gradient)


@torch.library.custom_op("autoquant::grouped_product_back", mutates_args=())
def _grouped_product_back(
    of_y: torch.Tensor, ends: torch.Tensor, parts: list[torch.Tensor], make: str
) -> torch.Tensor:
    """Return the gradient of x, from that of its product with the numbers that are stored."""
    weight = cast(ExpertsWeight, unflatten_tensor(_MAKES[make][0], parts))
    of_x = of_y.new_zeros(len(of_y), weight.stored.shape[1])
    for number, start, end in expert_rows(ends):
        numbers = weight.expert(number).dequantize()
        of_x[start:end] = of_y[start:end].to(numbers.dtype) @ numbers
    return of_x


@_grouped_product_back.register_fake
def _(of_y: torch.Tensor, ends: torch.Tensor, parts: list[torch.Tensor], make: str) -> torch.Tensor:
    return of_y.new_empty(of_y.shape[0], _MAKES[make][2])


def multiply_experts(x: torch.Tensor, weight: ExpertsWeight, ends: torch.Tensor) -> torch.Tensor:
    """Return x `[rows, k]`, sorted by expert, times each one's weight by its route: `[rows, n]`.

    Rows of no expert give zeros. On GPUs one kernel computes all experts. Its choice depends on how
    many rows an expert has if they are spread evenly, as the host knows no more.
    """
    if computes_at_once(x.device.type):
        return _multiply_at_once(x, weight, ends)
    parts, rebuild = flatten_tensor(weight.stored)
    experts, n = weight.experts, weight.stored.shape[0] // weight.experts
    y = x.new_zeros(x.shape[0], n)
    for number, start, end in expert_rows(ends):
        stored = _expert(parts, rebuild, number, experts)
        y[start:end] = multiply(x[start:end], weight, stored, None)
    return y


def kernel_for_expert(weight: ExpertsWeight, rows: int, own_rows: int) -> Kernel:
    """Return the kernel that computes an expert's `own_rows` of all `rows`."""
    spread = -(-rows // min(rows, weight.experts))
    m = spread if computes_at_once(weight.device.type) else own_rows
    return get_format(weight.format_id).kernel(kernel_for_rows(weight.route, m))


def _multiply_at_once(x: torch.Tensor, weight: ExpertsWeight, ends: torch.Tensor) -> torch.Tensor:
    rows = len(x)
    if not rows:
        return x.new_empty(0, weight.stored.shape[0] // weight.experts)
    kernel = kernel_for_expert(weight, rows, rows)
    if kernel.grouped is None:
        raise TypeError(f"{weight.format_id}/{kernel.id} cannot multiply experts on this device")
    return kernel.grouped(x.to(weight.compute_dtype), weight.stored, ends).to(x.dtype)


@ExpertsWeight.implements_torch_function(GROUPED_FUNCTIONS)  # type: ignore[untyped-decorator]
def _grouped(_func: Any, _types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = grouped_arguments(args, kwargs)
    weight = None if given is None else given[1]
    if given is None or not isinstance(weight, ExpertsWeight) or not weight.turned:
        raise TypeError("quantized experts can only be multiplied with rows of their own")
    return multiply_experts(given[0], weight, given[2])


@ExpertsWeight.implements_torch_function(torch.Tensor.transpose)  # type: ignore[untyped-decorator]
def _transpose(_func: Any, _types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, *dims = (*args, *kwargs.values())
    if {dim % 3 for dim in dims} != {1, 2}:
        raise TypeError("only the last two dimensions of quantized experts can be transposed")
    return weight.turn()


@ExpertsWeight.implements_torch_function(torch.Tensor.__getitem__)  # type: ignore[untyped-decorator]
def _item(_func: Any, _types: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    """Return one expert's weight, or the numbers of those that a tensor selects."""
    weight, index = args
    if not weight.turned and not (isinstance(index, torch.Tensor) and index.ndim):
        return weight.expert(int(index))
    return _numbers(weight, index).to(weight.compute_dtype)


def _numbers(weight: ExpertsWeight, index: torch.Tensor | int) -> torch.Tensor:
    """Return the float32 numbers of the experts that an index selects."""
    numbers = torch.as_tensor(index)
    chosen = [weight.expert(each).dequantize() for each in numbers.flatten().tolist()]
    selected = torch.stack(chosen).view(*numbers.shape, *chosen[0].shape)
    return selected.transpose(-2, -1) if weight.turned else selected


torch.serialization.add_safe_globals([ExpertsWeight])
