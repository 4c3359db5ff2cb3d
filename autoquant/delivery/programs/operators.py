"""Which kernels a program can hold: those whose operators exist without Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from autoquant.candidates import Kernel, get_format
from autoquant.candidates.base import A16
from autoquant.candidates.kernels.cpu_source import load_cpu_kernels
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.programs.plain import plain_copy
from autoquant.engines.programs import ProgramForm
from autoquant.errors import first_line
from autoquant.models.targets import dtype_name
from autoquant.records import LinearShape

OWN = "autoquant"
"""Namespace of the project's own operators."""
_OF_TORCH = ("aten", "prims", "prim", "quantized", "_quantized", "mkldnn", "onednn", "mkl", "_c10d")


@dataclass(frozen=True, slots=True)
class Substitute:
    """A kernel that stands in for another one, which no program can hold.

    Attributes:
        reason: Why it cannot.
        exact: Both round the activation in the same way.
    """

    wanted: str
    kernel: str
    reason: str
    exact: bool


class Packing:
    """Finds the kernel of each layer that a program holds.

    Args:
        form: The program's.
        device: Type of the device that it runs on.
    """

    def __init__(self, form: ProgramForm, device: str) -> None:
        self._form, self._device = form, device
        self._reasons: dict[tuple[object, ...], str | None] = {}

    def kernel(self, weight: RoutedWeight, wanted: str, rows: int) -> str | Substitute | None:
        """Return the kernel for a number of rows: that of the route, or a substitute.

        The substitute is one of the same format. One that rounds the activation in the same way is
        preferred, then one that does not round it. None: there is none.
        """
        reason = self.reason(weight, wanted, rows)
        if reason is None:
            return wanted
        asked = get_format(weight.format_id).kernel(wanted)
        for other in self._others(weight, asked, rows):
            if self.reason(weight, other.id, rows) is None:
                return Substitute(wanted, other.id, reason, other.numerics == asked.numerics)
        return None

    def reason(self, weight: RoutedWeight, kernel: str, rows: int) -> str | None:
        """Return why a program cannot hold a kernel, or None if it can."""
        key = (weight.format_id, kernel, tuple(weight.shape), weight.compute_dtype, rows)
        if key not in self._reasons:
            self._reasons[key] = self._found(weight, kernel, rows)
        return self._reasons[key]

    def _others(self, weight: RoutedWeight, asked: Kernel, rows: int) -> Iterator[Kernel]:
        fmt = get_format(weight.format_id)
        n, k = weight.shape
        shape = LinearShape(n=n, k=k, bias=False, dtype=dtype_name(weight.compute_dtype))
        for numerics in dict.fromkeys((asked.numerics, A16)):
            for kernel in fmt.kernels:
                fits = fmt.unsupported_reason(kernel, shape, rows, self._device) is None
                if kernel.numerics == numerics and kernel.id != asked.id and fits:
                    yield kernel

    def _found(self, weight: RoutedWeight, kernel: str, rows: int) -> str | None:
        n, k = weight.shape
        linear = nn.Linear(k, n, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        x = torch.ones(rows, k, dtype=weight.compute_dtype, device=weight.device)
        try:
            with torch.no_grad():
                program = torch.export.export(plain_copy(linear, {"weight": kernel}), (x,))
        except Exception as error:  # noqa: BLE001 - a kernel of anyone may raise anything
            return f"it cannot be traced ({first_line(error, with_type=True)})"
        lacking = [name for name in operators(program) if not self._holds(name)]
        return f"only Python knows its operator {lacking[0]}" if lacking else None

    def _holds(self, name: str) -> bool:
        namespace, _, operator = name.partition("::")
        if namespace == OWN:
            return self._device == "cpu" and load_cpu_kernels() is None
        if not operator:  # of higher order; the compiler writes these as code of its own
            return self._form.compiled and name.startswith("triton_kernel_wrapper")
        return namespace in _OF_TORCH


def operators(program: torch.export.ExportedProgram) -> list[str]:
    """Return the names of the operators that a program calls, e.g. `aten::mul`, each once."""
    names: dict[str, None] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            names[node.target._schema.name] = None
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            names[str(node.target)] = None
    return list(names)


def kernel_counts(module: nn.Module, kernels: Mapping[str, str]) -> dict[str, int]:
    """Count the layers of each kernel, by `FORMAT/KERNEL`."""
    counts: dict[str, int] = {}
    for name, kernel in kernels.items():
        weight = module.get_parameter(name).data
        assert isinstance(weight, RoutedWeight)
        key = f"{weight.format_id}/{kernel}"
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
