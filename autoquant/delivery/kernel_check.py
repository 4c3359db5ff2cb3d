"""Check the kernels of a quantized model on its device, against its weights' numbers.

A search checks kernels before it believes their times. Here the same rule is applied again: to a
plan that is proven, and to a model that was just quantized or loaded, perhaps on another machine or
with other libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates import Kernel, get_format, multiplied_numbers
from autoquant.candidates.calls import LinearCall, LinearHook, expert_rows
from autoquant.candidates.check import changed, fault, reference
from autoquant.candidates.experts import ExpertsWeight
from autoquant.candidates.kernels.caches import untuned, use_kernel_caches
from autoquant.candidates.linears import operand_of
from autoquant.candidates.routed import RouteAttribute, RoutedWeight, kernel_for_rows
from autoquant.devices import backend
from autoquant.errors import KernelError
from autoquant.models.targets import dtype_name
from autoquant.records import LinearShape

ROWS = (1, 2, 5, 16, 33)
"""Numbers of rows that kernels are checked with, where their route uses them."""

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
    return sum(checks.check(name, weight) for name, weight in _routed(module))


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


def _whole(weight: RoutedWeight) -> torch.Tensor:
    """Return the stored tensor of a linear, and of those that are computed as one with it."""
    stored = operand_of(weight)[0].stored
    assert stored is not None  # it is a routed weight's
    return stored


def _routed(module: nn.Module) -> Iterator[tuple[str, RoutedWeight]]:
    """Yield the quantized linears of a model, with their names."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter.data, RoutedWeight):
            yield name.removesuffix(".weight"), parameter.data


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
        if not isinstance(weight, ExpertsWeight) or call.ends is None:
            return self._checked(id(weight), weight, call.x, call)
        for expert, start, end in expert_rows(call.ends):
            one = weight.expert(expert)
            alone = LinearCall(F.linear, call.x[start:end], one, None)
            self._checked(id(weight), one, alone.x, alone)
        return None

    def _checked(
        self, key: int, weight: RoutedWeight, x: torch.Tensor, call: LinearCall
    ) -> torch.Tensor | None:
        """Compute a call and check the result; None if one of as many rows was checked before."""
        m = x.numel() // x.shape[-1]
        if (key, m) in self._seen:
            return None
        self._seen.add((key, m))
        layer = self._names.get(key, "a layer").removesuffix(".weight")
        fmt = get_format(weight.format_id)
        kernel = fmt.kernel(kernel_for_rows(weight.route, m))
        self._on_kernel(layer, fmt.id, kernel.id)
        y = call.compute(x, weight)
        numbers = multiplied_numbers(fmt, weight.stored, kernel.numerics)
        rounded = x.to(weight.compute_dtype)
        expected = reference(kernel, numbers, rounded, call.bias)
        if bool(expected.isfinite().all().item()):  # a model may overflow by itself
            reason = fault(y, expected, x.dtype, allowance=_IN_MODEL)
            _refuse(reason, layer, fmt.id, kernel.id, m)
        return y


def _check_weight(
    layer: str, weight: RoutedWeight, stored: torch.Tensor, on_kernel: OnKernel
) -> int:
    """Check the kernels of a weight's route; return the number of results."""
    fmt = get_format(weight.format_id)
    generator = torch.Generator(stored.device).manual_seed(0)
    device, dtype = stored.device, weight.compute_dtype
    n, k = stored.shape
    shape = LinearShape(n=n, k=k, bias=False, dtype=dtype_name(dtype))
    known: dict[str, torch.Tensor] = {}
    checked = 0
    for kernel_id, rows in _rows_of(weight.route):
        kernel = fmt.kernel(kernel_id)
        on_kernel(layer, fmt.id, kernel_id)
        if kernel.numerics not in known:
            known = {kernel.numerics: multiplied_numbers(fmt, stored, kernel.numerics)}
        for m in rows:
            if fmt.unsupported_reason(kernel, shape, m, device.type) is not None:
                continue  # of another device, say; a product says so, too
            x = torch.randn(1, m, stored.shape[1], generator=generator, device=device).to(dtype)
            expected = reference(kernel, known[kernel.numerics], x, None)
            reason = _reason(kernel, x, stored, expected)
            _refuse(reason, layer, fmt.id, kernel_id, m)
            checked += 1
    return checked


def _reason(kernel: Kernel, x: torch.Tensor, stored: torch.Tensor, expected: torch.Tensor) -> str:
    """Return what is wrong with two calls of a kernel, or an empty string."""
    first, second = (kernel.linear(x, stored, None) for _ in range(2))
    if reason := fault(first, expected, x.dtype) or fault(second, expected, x.dtype):
        return reason
    if kernel.repeats and backend(x.device).repeats and changed(first, second):
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
