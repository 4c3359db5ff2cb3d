"""The operators that a step started on the host, and the layer whose weight each reads.

PyTorch's profiler records the tensors that an operator, or a compiled kernel, is given. Weights do
not move, so the memory that a kernel reads identifies its layer, however the compiler fused it and
however often it reuses a block's code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _EventType, _RecordFunctionFast
from torch.profiler import record_function

from autoquant.candidates.flat import flatten_tensor

_LAYER = "autoquant layer "
_PRODUCT = re.compile(r"mm$|triton_tem|triton_mm")


@dataclass(frozen=True, slots=True)
class Operator:
    """An outermost operator that the host started, with all that it started in turn.

    Attributes:
        layers: The linears whose weights it reads.
        ids: The ids with which the profiler links kernels of a GPU to it.
    """

    name: str
    layers: tuple[str, ...]
    start_ns: int
    end_ns: int
    ids: tuple[int, ...]


class Weights:
    """Finds linears by where their weights lie in memory.

    Adjacent weights (see `autoquant.candidates.joined`) share their memory, and so their kernels.

    Args:
        layers: Name of a linear's weight, by the linear's name. Linears of the module that are not
            among them count, too.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, str]) -> None:
        self._module = module
        self._names: dict[int, dict[str, None]] = {}
        self._owners: dict[str, str] = {}
        named = {id(module.get_parameter(parameter)) for parameter in layers.values()}
        others = {
            name: f"{name}.weight"
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear) and id(child.weight) not in named
        }
        for name, parameter in {**layers, **others}.items():
            self._add(name, parameter)
        embeddings = [child.weight for child in module.modules() if isinstance(child, nn.Embedding)]
        self._embeddings = {place for weight in embeddings for place in _places(weight)}

    def _add(self, name: str, parameter: str) -> None:
        self._owners[name] = parameter.rpartition(".")[0]
        for place in _places(self._module.get_parameter(parameter)):
            self._names.setdefault(place, {})[name] = None

    def read_by(self, name: str, places: set[int]) -> tuple[str, ...]:
        """Return the linears whose weights lie at `places`.

        An embedding that shares a linear's weight does not count.
        """
        places = places - self._embeddings if "embedding" in name else places
        found = (names for place, names in self._names.items() if place in places)
        return tuple(dict.fromkeys(name for names in found for name in names))

    @contextmanager
    def ranges(self) -> Iterator[None]:
        """Inside, calls of linears that are not compiled are ranges of the profiler."""
        open_ranges: list[Any] = []
        handles = []
        for name, owner in self._owners.items():
            child = self._module.get_submodule(owner)

            def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
                open_ranges.append(record_function(_LAYER + name))
                open_ranges[-1].__enter__()

            def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
                open_ranges.pop().__exit__(None, None, None)

            if not isinstance(child, nn.Embedding):
                handles.append(child.register_forward_pre_hook(enter))
                handles.append(child.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def named_kernels() -> Iterator[None]:
    """Inside, compiled C++ kernels report names and inputs to the profiler, as Triton's do."""
    compiler = sys.modules.get("torch._inductor.codecache")
    modules = compiler.PyCodeCache.modules if compiler else []
    kernels = [
        (module, name, kernel)
        for module in modules
        for name, kernel in vars(module).items()
        if name.startswith("cpp_") and isinstance(kernel, BuiltinFunctionType)
    ]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, _named(kernel, name))
        yield
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def _named(kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with _RecordFunctionFast(name, args):
            return kernel(*args)

    return run


def operators(step: Any, weights: Weights) -> list[Operator]:
    """Return the operators that started within an event of the profiler, in order.

    A product reads the weight itself, or what another kernel has made of it (dequantized it) just
    before.
    """
    found = []
    made: dict[int, tuple[str, ...]] = {}
    for event, called in _outermost(step, ()):
        places = set(_inputs(event))
        multiplies = bool(_PRODUCT.search(event.name))
        layers = called or weights.read_by(event.name, places)
        if not layers and multiplies:
            layers = next((made[place] for place in places if place in made), ())
        for place in places:
            made.pop(place, None)
        if layers and not multiplies:
            made |= dict.fromkeys(places, layers)
        found.append(
            Operator(event.name, layers, event.start_time_ns, event.end_time_ns, tuple(_ids(event)))
        )
    return found


def _outermost(event: Any, called: tuple[str, ...]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Yield an event's outermost operators, each with the uncompiled linear that calls it.

    Ranges, and compiled regions, are searched. So are events of the GPU, which the profiler files
    under the host's events by time alone: a range there may seem to hold operators.
    """
    if event.tag == _EventType.TorchOp:
        if event.name.startswith(_LAYER):
            called = (event.name.removeprefix(_LAYER),)
        elif "::" in event.name or not event.children or _takes_tensors(event):
            yield event, called
            return
    for child in event.children:
        yield from _outermost(child, called)


def _takes_tensors(event: Any) -> bool:
    return any(hasattr(value, "storage_data_ptr") for value in event.extra_fields.inputs)


def _inputs(event: Any) -> Iterator[int]:
    """Yield where each tensor's memory begins that an event, or one inside it, is given."""
    for value in getattr(event.extra_fields, "inputs", ()):
        for tensor in value if isinstance(value, list) else [value]:
            if place := getattr(tensor, "storage_data_ptr", None):
                yield place
    for child in event.children:
        yield from _inputs(child)


def _ids(event: Any) -> Iterator[int]:
    yield event.correlation_id
    for child in event.children:
        yield from _ids(child)


def _places(weight: torch.Tensor) -> list[int]:
    """Return where the memory of each plain tensor inside a weight begins."""
    return [part.untyped_storage().data_ptr() for part in flatten_tensor(weight)[0]]
