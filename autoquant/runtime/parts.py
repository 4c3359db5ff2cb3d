"""A model compiled part by part, each different part once, for steps that are replayed as CUDA graphs.

Between the kernels of a replayed graph nothing is left of the code that started them, so the model's own code may run around its
compiled parts: its blocks, and the largest modules beside them. Compiling a model in one piece costs the compiler's first two
stages about 0.4 s for each block and phase, also where blocks are alike and the third stage compiles them once. Here a part is
traced by running it with tensors that hold nothing, in a few hundredths of a second, and the tensors that it knows by itself
(weights, its cache) become inputs of the graph. Parts whose graphs are the same are one compiled function, in every plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoquant.candidates.calls import LinearCall, LinearHook
from autoquant.records import content_key
from autoquant.runtime.compiled import compile_graph, repeated_blocks


def compile_parts(module: nn.Module) -> nn.Module:
    """Have the parts of `module` compiled, each when it is first called with arguments of some shapes."""
    for part in _parts(module):
        part.forward = _Part(part.forward)
    return module


@contextmanager
def told_that_it_is_compiled(told: bool = True) -> Iterator[None]:
    """Inside, code that asks whether it is compiled gets this answer. Compiled code decides nothing by a tensor's values."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = told
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _parts(module: nn.Module) -> list[nn.Module]:
    """The blocks, and the largest modules that hold none."""
    blocks = set(repeated_blocks(module))

    def within(owner: nn.Module) -> Iterator[nn.Module]:
        for child in owner.children():
            callable_itself = type(child).forward is not nn.Module.forward
            if child in blocks or (callable_itself and blocks.isdisjoint(child.modules())):
                yield child
            else:
                yield from within(child)

    return list(within(module))


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A part compiled for arguments of some shapes.

    Attributes:
        others: Arguments that are no tensors; kept, for `signature` has their ids.
        constants: What the part knows by itself.
        results: What it returns, with the numbers of the function's results in the place of tensors.
    """

    signature: tuple[Any, ...]
    others: Sequence[Any]
    function: Callable[..., Sequence[torch.Tensor]]
    constants: Sequence[torch.Tensor]
    results: Sequence[Any]
    structure: pytree.TreeSpec

    def __call__(self, leaves: Sequence[Any]) -> Any:
        tensors = self.function(*(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), *self.constants)
        values = [tensors[value.number] if isinstance(value, _Number) else value for value in self.results]
        return pytree.tree_unflatten(values, self.structure)


@dataclass(frozen=True, slots=True)
class _Number:
    number: int


class _Part:
    """Stands for a module's forward pass."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._compiled: list[_Compiled] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        signature = (structure, *map(_signature, leaves))
        known = next((compiled for compiled in self._compiled if compiled.signature == signature), None)
        if known is None:
            known = _compile(self._forward, leaves, structure, signature)
            self._compiled.append(known)
        with told_that_it_is_compiled(False):
            return known(leaves)


def _signature(leaf: Any) -> Any:
    """What code that was traced with this argument, or value of a part's own, depends on."""
    if isinstance(leaf, torch.Tensor):
        return str(leaf.dtype), str(leaf.device), tuple(leaf.shape), leaf.stride()
    return leaf if leaf is None or isinstance(leaf, (bool, int, float, str)) else id(leaf)


def _compile(
    forward: Callable[..., Any], leaves: Sequence[Any], structure: pytree.TreeSpec, signature: tuple[Any, ...]
) -> _Compiled:
    results: list[Any] = []
    shape: list[pytree.TreeSpec] = []

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        given = iter(tensors)
        values = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(values, structure)
        returned, returned_structure = pytree.tree_flatten(forward(*args, **kwargs))
        found = [value for value in returned if isinstance(value, torch.Tensor)]
        numbers = iter(range(len(found)))
        results[:] = [_Number(next(numbers)) if isinstance(value, torch.Tensor) else value for value in returned]
        shape[:] = [returned_structure]
        return found

    inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    with told_that_it_is_compiled(), _Hollow() as hollow, _LinearsOfRows():
        graph = make_fx(flat)(*map(hollow.of, inputs))
    constants = _as_inputs(graph)
    function = _function(graph, [*inputs, *constants])
    others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    return _Compiled(signature, others, function, constants, tuple(results), shape[0])


class _Hollow(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Operators compute with tensors that hold nothing, also where they are given others, which they might change."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self.of, (args, kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)


class _LinearsOfRows(LinearHook):
    """Linears are given the rows of their input as a matrix.

    PyTorch makes a product per sample of them otherwise where the strides of an input of three dimensions do not tell that it is
    a matrix, as after attention with one token: cuBLAS then took 47 us for 4096x4096 and 16 rows, and 13 for the matrix.
    """

    def on_linear(self, call: LinearCall) -> torch.Tensor:
        y = call.compute(call.x.reshape(-1, call.x.shape[-1]), call.weight)
        return y.view(*call.x.shape[:-1], y.shape[-1])


def _as_inputs(graph: torch.fx.GraphModule) -> list[torch.Tensor]:
    """Make the tensors that a graph holds its last inputs; returns them.

    Raises:
        TypeError: It holds something else, or a tensor that is no plain one.
    """
    constants: dict[int, tuple[torch.Tensor, torch.fx.Node]] = {}
    first = next(node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr"))
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(graph, node.target)
        if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
            raise TypeError(f"a part that holds a {type(value).__name__} cannot be compiled by itself")
        if id(value) not in constants:
            with graph.graph.inserting_before(first):
                constants[id(value)] = (value, graph.graph.placeholder(f"constant{len(constants)}"))
        node.replace_all_uses_with(constants[id(value)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [value for value, _ in constants.values()]


_FUNCTIONS: dict[str, Callable[..., Sequence[torch.Tensor]]] = {}


def _function(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Sequence[torch.Tensor]]:
    """The graph compiled; one function for all graphs that are the same."""
    places = list(map(id, inputs))
    same = [places.index(place) for place in places]
    key = content_key([graph.code, [_signature(tensor) for tensor in inputs], same], length=32)
    if key not in _FUNCTIONS:
        without_tensors = torch.fx.GraphModule(nn.Module(), graph.graph)
        with told_that_it_is_compiled(False):
            _FUNCTIONS[key] = compile_graph(without_tensors, inputs)
    return _FUNCTIONS[key]
