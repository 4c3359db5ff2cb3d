"""A model compiled part by part, for steps that are replayed as CUDA graphs.

A replayed graph runs no Python, so the model's own code may stay around its compiled parts: its
blocks, and the largest other modules. If a model is compiled in one piece, the compiler's first two
stages take about 0.4 s for each block and phase, even if blocks are alike and the third stage
compiles them once. Here a part is traced by running it with fake tensors, in a few hundredths of a
second. The tensors that it holds (weights, its cache) become inputs of the graph. Parts with the
same graph become one compiled function, in all plans.
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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoquant.candidates.calls import LINEAR_FUNCTIONS, linear_arguments
from autoquant.records import content_key
from autoquant.runtime.caches import FUNCTIONS
from autoquant.runtime.compiled import compile_graph, repeated_blocks


def compile_parts(module: nn.Module) -> nn.Module:
    """Have each part of `module` compiled when it is first called with arguments of some shapes."""
    for part in _parts(module):
        part.forward = _Part(part.forward)
    return module


@contextmanager
def told_that_it_is_compiled(told: bool = True) -> Iterator[None]:
    """Inside, code that asks whether it is compiled gets this answer.

    Compiled code branches on no tensor's values.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = told
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return the blocks, and the largest modules that hold none."""
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
        others: Non-tensor arguments, kept alive because `signature` holds their ids.
        constants: Tensors that the part holds.
        results: What it returns, with the index of the function's result in place of each tensor.
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
    """Return what traced code depends on of an argument, or of a tensor that a part holds."""
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
    """Runs operators on fake tensors.

    Real inputs are converted too, because an operator may change them.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self.of, (args, kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)


class _LinearsOfRows(TorchFunctionMode):
    """Gives linears the rows of their input as a matrix.

    Otherwise PyTorch makes one product for each sample if the strides of an input of three
    dimensions are not those of a matrix, as after attention with one token. For 4096x4096 and 16
    rows cuBLAS took 47 us that way, and 13 for the matrix.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in LINEAR_FUNCTIONS:
            return func(*args, **(kwargs or {}))
        x, weight, bias = linear_arguments(args, kwargs)
        y = func(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], y.shape[-1])


def _as_inputs(graph: torch.fx.GraphModule) -> list[torch.Tensor]:
    """Make the tensors that a graph holds its last inputs, and return them.

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


def _function(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Sequence[torch.Tensor]]:
    """Compile a graph; graphs that are the same get one function."""
    places = list(map(id, inputs))
    same = [places.index(place) for place in places]
    key = content_key([graph.code, [_signature(tensor) for tensor in inputs], same], length=32)
    if key not in FUNCTIONS:
        without_tensors = torch.fx.GraphModule(nn.Module(), graph.graph)
        with told_that_it_is_compiled(False):
            FUNCTIONS[key] = compile_graph(without_tensors, inputs)
    return FUNCTIONS[key]
