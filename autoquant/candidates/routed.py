"""Define the weight of a quantized linear: a stored tensor, and the kernel for each range of m."""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path
from typing import Any, cast

import torch
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.calls import LINEAR_FUNCTIONS, linear_arguments
from autoquant.candidates.flat import move_tensor
from autoquant.candidates.registry import get_format
from autoquant.errors import ModelError
from autoquant.records import Route, RouteStep, content_key

RouteAttribute = tuple[tuple[int | None, str], ...]


class RoutedWeight(TorchAOBaseTensor):  # type: ignore[misc]
    """A linear's weight whose kernel depends on the number of rows of the activation.

    Tensor attributes:
        stored: The format's tensor `[n, k]`, plain or a subclass of torchao's.

    Other attributes:
        format_id: Id of the format.
        route: ((upper m or None, kernel id), ...). If m is static, the kernel is chosen while
            tracing, at no cost.
        compute_dtype: The unquantized weight's dtype. The weight shows it and computes in it,
            whatever the activation's dtype. A cast of the model (`.half()`, `.float()`) does not
            change it.
    """

    tensor_data_names = ["stored"]  # noqa: RUF012
    tensor_attribute_names = ["format_id", "route", "compute_dtype"]  # noqa: RUF012

    def __new__(
        cls, stored: torch.Tensor, format_id: str, route: RouteAttribute, compute_dtype: torch.dtype
    ) -> RoutedWeight:
        return torch.Tensor._make_wrapper_subclass(
            cls, stored.shape, dtype=compute_dtype, device=stored.device, requires_grad=False
        )

    def __init__(
        self,
        stored: torch.Tensor,
        format_id: str,
        route: RouteAttribute,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.stored = stored
        self.format_id = format_id
        self.route = route
        self.compute_dtype = compute_dtype

    def __repr__(self) -> str:
        """Say what the weight is, without its numbers: they would fill the screen."""
        kernels = ", ".join(dict.fromkeys(kernel for _, kernel in self.route))
        size = " x ".join(map(str, self.shape))
        return f"{type(self).__name__}({self.format_id} {size} for {self.compute_dtype}, {kernels})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        except NotImplementedError as error:
            raise ModelError(
                f"{func} cannot be computed with a weight that autoquant quantized, only linears"
                " can: merge adapters and change weights before the model is quantized"
            ) from error

    @classmethod
    def wrap(
        cls, stored: torch.Tensor, format_id: str, route: Route, compute_dtype: torch.dtype
    ) -> RoutedWeight:
        """Put `route` around a stored tensor."""
        return cls(
            stored, format_id, tuple((step.upper_m, step.kernel) for step in route), compute_dtype
        )

    def steps(self) -> Route:
        """Return the route as records."""
        return tuple(RouteStep(upper_m=upper, kernel=kernel) for upper, kernel in self.route)

    def _stable_hash_for_caching(self) -> str:
        """Return a key of all that compiled code depends on, for PyTorch's compile cache."""
        inner = type(self.stored).__name__, str(self.stored.dtype), tuple(self.stored.shape)
        return content_key(
            [self.format_id, self.route, str(self.compute_dtype), inner, self.code_key()]
        )

    def code_key(self) -> str:
        """Return a hash of the code of the route's kernels."""
        functions = [get_kernel_function(self.format_id, kernel) for _, kernel in self.route]
        return content_key([_code_key(function) for function in functions])

    def dequantize(self) -> torch.Tensor:
        """Return the float32 numbers `[n, k]` that the weight stores."""
        return get_format(self.format_id).dequantize(self.stored)


def kernel_for_rows(route: RouteAttribute, m: int) -> str:
    """Return the id of the kernel that a route uses for m rows."""
    for upper, kernel in route:
        if upper is None or m <= upper:
            return kernel
    return route[-1][1]


@RoutedWeight.implements([torch.ops.aten.linear.default])  # type: ignore[untyped-decorator]
@RoutedWeight.implements_torch_function(LINEAR_FUNCTIONS)  # type: ignore[untyped-decorator]
def _linear(_func: Any, _types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    x, weight, bias = linear_arguments(args, kwargs)
    if not isinstance(weight, RoutedWeight):
        raise TypeError("a routed weight can only be the weight of a linear")
    return multiply(x, weight, weight.stored, bias)


def multiply(
    x: torch.Tensor, weight: RoutedWeight, stored: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return x `[..., k]` times a stored tensor `[n, k]`, with a weight's route and dtype.

    Its gradient is that of the numbers which the weight stores, so adapters can be trained beside
    it.

    Args:
        stored: The weight's own tensor, or a larger one that it is a part of.
    """
    rows = math.prod(x.shape[:-1])  # `numel` of a shape would fix sizes that a trace leaves open
    if rows == 0 and not torch.compiler.is_compiling():  # an idle expert; kernels expect rows
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    if x.requires_grad and torch.is_grad_enabled():
        product: Any = _WithGradient.apply
        return cast(torch.Tensor, product(x, weight, stored, bias))
    return _by_kernel(x, rows, weight, stored, bias)


class _WithGradient(torch.autograd.Function):
    """A product with a gradient, which kernels lack: most round the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: RoutedWeight,
        stored: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.format_id, ctx.stored, ctx.dtype = weight.format_id, stored, x.dtype
        return _by_kernel(x, x.shape[:-1].numel(), weight, stored, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (of_y,) = gradients
        numbers = get_format(ctx.format_id).dequantize(ctx.stored)
        of_x = (of_y.to(numbers.dtype) @ numbers).to(ctx.dtype)
        of_bias = of_y.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return of_x, None, None, of_bias


def _by_kernel(
    x: torch.Tensor,
    rows: int,
    weight: RoutedWeight,
    stored: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    kernel = get_kernel_function(weight.format_id, kernel_for_rows(weight.route, rows))
    if x.dtype == weight.compute_dtype:
        return cast(torch.Tensor, kernel(x, stored, bias))
    bias = None if bias is None else bias.to(weight.compute_dtype)
    return cast(torch.Tensor, kernel(x.to(weight.compute_dtype), stored, bias).to(x.dtype))


@RoutedWeight.implements(torch.ops.aten._to_copy.default)  # type: ignore[untyped-decorator]
def _to_copy(
    _func: Any, _types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Move to another device; a cast keeps the weight, its dtype and its memory."""
    weight: RoutedWeight = args[0]
    cast_to = kwargs.get("dtype") or weight.dtype
    return move_tensor(weight, kwargs.get("device") or weight.device, copy=cast_to == weight.dtype)


_KERNEL_FUNCTIONS: dict[tuple[str, str], Any] = {}


def get_kernel_function(format_id: str, kernel_id: str) -> Any:
    """Return a kernel's function. The compiler traces this look-up, so it uses a plain dict."""
    key = (format_id, kernel_id)
    if key not in _KERNEL_FUNCTIONS:
        _KERNEL_FUNCTIONS[key] = get_format(format_id).kernel(kernel_id).linear
    return _KERNEL_FUNCTIONS[key]


@functools.cache
def _code_key(function: Any) -> str:
    """Return a hash of a function's source file, or of its bytecode if there is no file.

    A function that wraps another has a hash of both.
    """
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    try:
        source = Path(code.co_filename).read_bytes() if code is not None else b""
    except OSError:
        source = code.co_code if code is not None else b""
    if (inside := getattr(function, "__wrapped__", None)) is not None:
        source += _code_key(inside).encode()
    return hashlib.sha256(source).hexdigest()[:12]


torch.serialization.add_safe_globals([RoutedWeight])
