"""Check the kernels of a quantized model on its device, against its weights' numbers.

A search checks kernels before it believes their times. Here the same rule is applied again: to a
plan that is proven, and to a model that was just quantized or loaded, perhaps on another machine or
with other libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from autoquant.candidates import Kernel, activation_rounding, get_format, multiplied_numbers
from autoquant.candidates.calls import LinearCall, LinearHook, expert_rows
from autoquant.candidates.check import changed, fault, reference
from autoquant.candidates.experts import ExpertsWeight, computes_at_once, kernel_for_expert
from autoquant.candidates.kernels.caches import untuned, use_kernel_caches
from autoquant.candidates.linears import operand_of
from autoquant.candidates.lookups import is_table_alone, wrong_rows
from autoquant.candidates.routed import RouteAttribute, RoutedWeight, kernel_for_rows
from autoquant.devices import backend
from autoquant.errors import KernelError
from autoquant.models.targets import dtype_name
from autoquant.records import LOOKUP, LinearShape

ROWS = (1, 2, 5, 16, 33)
"""Numbers of rows that kernels are checked with, where their route uses them."""

_TYPICAL_RANGE = 4
"""What a stored range is over the root mean square of the numbers that a kernel is checked with."""
_IN_MODEL = 5
"""Times the usual errors: activations of a model may cancel, which random numbers do not."""

OnKernel = Callable[[str, str, str], None]
"""Takes the layer, the format and the kernel that is called next."""


def ignore_kernel(_layer: str, _format: str, _kernel: str) -> None:
    """Do nothing: for those who need not know which kernel is called."""


def check_kernels(module: nn.Module, on_kernel: OnKernel = ignore_kernel) -> int:
    """Check each format, kernel and shape of a model once, with few rows of random numbers.

    Layers that are computed as one are checked as one.

    Returns:
        The number of results that were checked.

    Raises:
        KernelError: A kernel computes something else than its weight stores.
        CandidateError: On a GPU, others may write into the folder of compiled kernels.
    """
    place = next((parameter.device for parameter in module.parameters()), None)
    checks = KernelChecks(place, on_kernel)
    tables = sum(checks.check_table(name, weight) for name, weight in _tables(module))
    return tables + sum(checks.check(name, weight) for name, weight in _routed(module))


class KernelChecks:
    """Checks weights as `check_kernels` does, as they come.

    Args:
        place: The device of the weights, or None if there are none.
    """

    def __init__(
        self, place: torch.device | str | None, on_kernel: OnKernel = ignore_kernel
    ) -> None:
        self._seen: set[tuple[object, ...]] = set()
        self._on_kernel = on_kernel
        if place is not None and backend(place).prepares:
            use_kernel_caches()  # those that a search compiled for its checks are there

    @torch.no_grad()
    def check(self, name: str, weight: RoutedWeight) -> int:
        """Check a weight unless one like it was; return the number of results.

        Raises:
            KernelError: A kernel computes something else than the weight stores.
        """
        if isinstance(weight, ExpertsWeight):
            stored = weight.expert(weight.experts - 1).stored
        else:
            stored = _whole(weight)
        key = (weight.format_id, weight.route, stored.shape, weight.compute_dtype)
        if key in self._seen:
            return 0
        self._seen.add(key)
        with untuned():  # tuning takes seconds for each shape and number of rows
            return _check_weight(name, weight, stored, self._on_kernel)

    @torch.no_grad()
    def check_table(self, name: str, weight: RoutedWeight) -> int:
        """Check the rows that are looked up in a table; return 1.

        Raises:
            KernelError: They are others than the table stores.
        """
        self._on_kernel(name, weight.format_id, LOOKUP)
        _refuse(wrong_rows(weight), name, weight.format_id, LOOKUP, 1)
        return 1


def _whole(weight: RoutedWeight) -> torch.Tensor:
    """Return the stored tensor of a linear, and of those that are computed as one with it."""
    stored = operand_of(weight)[0].stored
    assert stored is not None  # it is a routed weight's
    return stored


def _routed(module: nn.Module) -> Iterator[tuple[str, RoutedWeight]]:
    """Yield the quantized linears of a model, with their names."""
    for name, parameter in module.named_parameters():
        weight = parameter.data
        if isinstance(weight, RoutedWeight) and not is_table_alone(weight):
            yield name.removesuffix(".weight"), weight


def _tables(module: nn.Module) -> Iterator[tuple[str, RoutedWeight]]:
    """Yield the quantized tables of embeddings, with their names."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding) and isinstance(part.weight.data, RoutedWeight):
            yield name, part.weight.data


class KernelsInModel(LinearHook):
    """While active, checks every quantized linear on the numbers that the model gives it.

    Each is checked once for each number of rows.

    Args:
        module: The model, whose parameters name the layers.
        on_kernel: Takes the kernel that is called next.

    Raises:
        KernelError: While active, when a kernel computes something else than its weight stores.
    """

    def __init__(self, module: nn.Module, on_kernel: OnKernel = ignore_kernel) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._on_kernel = on_kernel
        self._seen: set[tuple[int, int]] = set()

    def on_linear(self, call: LinearCall) -> torch.Tensor | None:
        weight = call.weight
        if not isinstance(weight, RoutedWeight) or not call.x.numel():
            return None
        if isinstance(weight, ExpertsWeight) and call.ends is not None:
            return self._experts_checked(weight, call, call.ends)
        m = call.x.numel() // call.x.shape[-1]
        if not self._is_new(weight, m):
            return None
        kernel = get_format(weight.format_id).kernel(kernel_for_rows(weight.route, m))
        self._tell(weight, kernel)
        y = call.compute(call.x, weight)
        self._check(weight, weight, kernel, call.x, call.bias, y)
        return y

    def _experts_checked(
        self, weight: ExpertsWeight, call: LinearCall, ends: torch.Tensor
    ) -> torch.Tensor | None:
        """Compute a call of experts, and check those that have another number of rows than before.

        All are computed first: which rows are whose may decide how.
        """
        new = [
            (weight.expert(number), start, end)
            for number, start, end in expert_rows(ends)
            if self._is_new(weight, end - start)
        ]
        if not new:
            return None
        kernels = [kernel_for_expert(weight, len(call.x), end - start) for _, start, end in new]
        for kernel in dict.fromkeys(kernels):
            self._tell(weight, kernel)
        y = call.compute(call.x, call.straight())
        for (one, start, end), kernel in zip(new, kernels, strict=True):
            self._check(weight, one, kernel, call.x[start:end], None, y[start:end])
        return y

    def _is_new(self, weight: RoutedWeight, m: int) -> bool:
        """Check that no result of m rows was checked before, and note that one is now."""
        new = (id(weight), m) not in self._seen
        self._seen.add((id(weight), m))
        return new

    def _tell(self, weight: RoutedWeight, kernel: Kernel) -> None:
        self._on_kernel(self._layer(weight), weight.format_id, kernel.id)

    def _layer(self, weight: RoutedWeight) -> str:
        return self._names.get(id(weight), "a layer").removesuffix(".weight")

    def _check(
        self,
        named: RoutedWeight,
        weight: RoutedWeight,
        kernel: Kernel,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        y: torch.Tensor,
    ) -> None:
        """Check a result of a weight, which may be an expert's of the one that is `named`."""
        fmt, m = get_format(weight.format_id), x.numel() // x.shape[-1]
        numbers = multiplied_numbers(fmt, weight.stored, kernel.numerics)
        rounding = fmt.activation_rounding(kernel.numerics, weight.stored)
        expected = reference(rounding, numbers, x.to(weight.compute_dtype), bias)
        if bool(expected.isfinite().all().item()):  # a model may overflow by itself
            reason = fault(y, expected, x.dtype, allowance=_IN_MODEL)
            _refuse(reason, self._layer(named), fmt.id, kernel.id, m)


def _check_weight(
    layer: str, weight: RoutedWeight, stored: torch.Tensor, on_kernel: OnKernel
) -> int:
    """Check the kernels of a weight's route; return the number of results."""
    fmt = get_format(weight.format_id)
    generator = torch.Generator(stored.device).manual_seed(0)
    device, dtype = stored.device, weight.compute_dtype
    n, k = stored.shape
    shape = LinearShape(n=n, k=k, bias=False, dtype=dtype_name(dtype))
    kept = fmt.input_kept(stored) if fmt.input_kept else None
    # Numbers beyond a stored range would be clipped, and those far below it be 0.
    size = 1.0 if kept is None or kept.ndim else kept / _TYPICAL_RANGE
    known: dict[str, torch.Tensor] = {}
    checked = 0
    for kernel_id, rows in _rows_of(weight.route):
        kernel = fmt.kernel(kernel_id)
        on_kernel(layer, fmt.id, kernel_id)
        if kernel.numerics not in known:
            known = {kernel.numerics: multiplied_numbers(fmt, stored, kernel.numerics)}
            rounding = activation_rounding(kernel.numerics, kept)
        for m in rows:
            if fmt.unsupported_reason(kernel, shape, m, device.type) is not None:
                continue  # of another device, say; a product says so, too
            x = (size * torch.randn(1, m, k, generator=generator, device=device)).to(dtype)
            expected = reference(rounding, known[kernel.numerics], x, None)
            product = functools.partial(_multiply, kernel, weight, x, stored)
            reason = _reason(product, dtype, expected, kernel.repeats)
            _refuse(reason, layer, fmt.id, kernel_id, m)
            checked += 1
    return checked


def _multiply(
    kernel: Kernel, weight: RoutedWeight, x: torch.Tensor, stored: torch.Tensor
) -> torch.Tensor:
    """Multiply x `[1, m, k]` as a model does with a weight; if it is of experts, by one of them."""
    if kernel.grouped and isinstance(weight, ExpertsWeight) and computes_at_once(x.device.type):
        end = torch.tensor([x.shape[1]], dtype=torch.int32, device=x.device)
        return kernel.grouped(x[0], stored, end)[None]
    return kernel.linear(x, stored, None)


def _reason(
    product: Callable[[], torch.Tensor], dtype: torch.dtype, expected: torch.Tensor, repeats: bool
) -> str:
    """Return what is wrong with two calls of a kernel, or an empty string."""
    first, second = product(), product()
    if reason := fault(first, expected, dtype) or fault(second, expected, dtype):
        return reason
    if repeats and backend(expected.device).repeats and changed(first, second):
        return "the same input gave other bits the second time"
    return ""


def _rows_of(route: RouteAttribute) -> Iterator[tuple[str, list[int]]]:
    """Yield the kernels of a route, each with the rows to check it with."""
    least = 1
    for upper, kernel in route:
        rows = [m for m in ROWS if m >= least and (upper is None or m <= upper)]
        yield kernel, rows or [least]
        if upper is not None:
            least = upper + 1


def _refuse(reason: str, layer: str, format_id: str, kernel: str, m: int) -> None:
    if reason:
        what = f"at m={m} in {layer}: {reason}"
        raise KernelError(
            f"kernel {format_id}/{kernel} computes wrong numbers here {what}; search again on this"
            " machine, which leaves the kernel out, or report it to those who made it",
            format_id=format_id,
            kernel=kernel,
            reason=what,
        )
