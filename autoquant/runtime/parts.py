"""Compile a model part by part, each different part once.

The model's own code runs around its compiled parts: its blocks, and the largest modules outside
them. On a GPU a step is replayed as a CUDA graph, which holds none of that code.

Compiling a model in one piece costs about 0.4 s for each block and phase in the compiler's first
two stages, even if blocks are alike and the third stage compiles them once. Here a part is traced
with fake tensors in a few hundredths of a second, and the tensors that it holds (weights, its
cache) become inputs of the graph. Parts with equal graphs share one compiled function, in every
plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from autoquant.devices import backend
from autoquant.devices.recorded_steps import call_as_one, is_recorded
from autoquant.errors import first_line
from autoquant.records import content_key
from autoquant.runtime.caches import FUNCTIONS
from autoquant.runtime.compiled import compile_graph, repeated_blocks
from autoquant.runtime.traces import Trace, followed, recorded

_log = logging.getLogger(__name__)


def compile_parts(module: nn.Module) -> nn.Module:
    """Compile the parts of `module`, each when it is first called with arguments of new shapes."""
    known: _Known = {}
    for part in _parts(module):
        part.forward = _Part(part.forward, known)
    return module


@contextmanager
def as_if_compiled(compiling: bool = True) -> Iterator[None]:
    """Inside, code that asks whether it is being compiled gets this answer.

    Models ask to avoid decisions by a tensor's values, which no traced code can make.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = compiling
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextmanager
def visible_kernels() -> Iterator[None]:
    """Inside, parts are compiled so that the profiler sees each kernel: Python calls it."""
    global _visible
    before, _visible = _visible, True
    try:
        yield
    finally:
        _visible = before


_visible = False


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return the blocks, and the largest modules that contain none."""
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
        others: Non-tensor arguments, kept alive because the part is found again by their ids.
        constants: Tensors that the part holds itself.
        results: What it returns, with a `_Number` of the function's result for each tensor.
    """

    others: Sequence[Any]
    function: Callable[..., Sequence[torch.Tensor]]
    constants: Sequence[torch.Tensor]
    results: Sequence[Any]
    structure: pytree.TreeSpec

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        tensors = call_as_one(self.function, given, self.constants)
        values = [tensors[v.number] if isinstance(v, _Number) else v for v in self.results]
        return pytree.tree_unflatten(values, self.structure)


@dataclass(frozen=True, slots=True)
class _Number:
    number: int


@dataclass(frozen=True, slots=True)
class _Traced:
    """A part that was traced. Parts that do the same are called by the same function.

    Attributes:
        constants: The numbers that the function's last inputs have in the trace.
        same: See `_same`.
    """

    trace: Trace
    function: Callable[..., Sequence[torch.Tensor]]
    constants: Sequence[int]
    same: Sequence[int]


_Known = dict[tuple[Any, ...], list[_Traced]]
"""What was traced for arguments of each kind."""


class _Part:
    """Takes the place of a module's `forward`."""

    def __init__(self, forward: Callable[..., Any], known: _Known) -> None:
        self._forward, self._known = forward, known
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors: list[torch.Tensor] = []
        kinds: list[Any] = []
        _look(args, tensors, kinds)
        _look(kwargs, tensors, kinds)
        key = (_visible, *kinds)
        known = self._compiled.get(key)
        if known is None:
            traced = self._known.setdefault(key, [])
            known = self._compiled[key] = _compile(self._forward, args, kwargs, traced)
        with as_if_compiled(False):
            return known(tensors)


def _look(value: Any, tensors: list[torch.Tensor], kinds: list[Any]) -> None:
    """Collect the tensors in an argument, and what traced code depends on.

    Every step does this for every part, and `tree_flatten` takes several times as long.
    """
    kind = type(value)
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        kinds += (value.dtype, value.device, value.shape, value.stride())
    elif kind is tuple or kind is list:
        kinds += (kind, len(value))
        for each in value:
            _look(each, tensors, kinds)
    elif kind is dict:
        kinds.append(tuple(value))
        for each in value.values():
            _look(each, tensors, kinds)
    elif not pytree.tree_is_leaf(value):  # of a registered type
        leaves, structure = pytree.tree_flatten(value)
        kinds.append(structure)
        _look(leaves, tensors, kinds)
    else:
        plain = value is None or isinstance(value, (bool, int, float, str))
        kinds += (kind, value if plain else id(value))


def _signature(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what compiled code depends on of a tensor."""
    return str(tensor.dtype), str(tensor.device), tuple(tensor.shape), tensor.stride()


def _compile(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], known: list[_Traced]
) -> _Compiled:
    """Compile a part, or find one among those known that does the same."""
    flat = _Flat(forward, args, kwargs)
    with as_if_compiled(), _LinearsOfRows():
        for traced in known:
            if (constants := _follow(flat, traced)) is not None:
                return flat.compiled(traced.function, constants)
        trace = Trace()
        with _Hollow() as hollow:
            graph = make_fx(recorded(flat, trace))(*map(hollow.of, flat.inputs))
    constants = _as_inputs(graph)
    tensors = [*flat.inputs, *constants]
    function = _function(graph, tensors)
    numbers = trace.numbers_of(constants)
    if trace.complete and numbers is not None:
        known.append(_Traced(trace, function, numbers, _same(tensors)))
    return flat.compiled(function, constants)


def _follow(flat: _Flat, traced: _Traced) -> list[torch.Tensor] | None:
    """Return what a part holds, in the order of a traced one's. None: it does something else."""
    held = followed(flat, traced.trace)
    if held is None:
        return None
    constants = [held[number] for number in traced.constants]
    return constants if _same([*flat.inputs, *constants]) == traced.same else None


class _Flat:
    """A part run from tensors to tensors, which is what can be traced.

    What else it returns is noted on the way. It is the same in every call, as what a part is found
    by covers all arguments that are no tensors.
    """

    def __init__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._forward = forward
        self._leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self.inputs = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]
        self._results: list[Any] = []
        self._returned: pytree.TreeSpec | None = None

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        given = iter(tensors)
        values = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(values, self._structure)
        returned, self._returned = pytree.tree_flatten(self._forward(*args, **kwargs))
        found: list[torch.Tensor] = []
        self._results = []
        for value in returned:
            is_tensor = isinstance(value, torch.Tensor)
            self._results.append(_Number(len(found)) if is_tensor else value)
            found += [value] if is_tensor else []
        return found

    def compiled(
        self,
        function: Callable[..., Sequence[torch.Tensor]],
        constants: Sequence[torch.Tensor],
    ) -> _Compiled:
        """Return the part, computed by a function from its inputs and what it holds."""
        assert self._returned is not None  # it was run
        others = [leaf for leaf in self._leaves if not isinstance(leaf, torch.Tensor)]
        return _Compiled(others, function, constants, tuple(self._results), self._returned)


class _Hollow(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Runs operators on fake tensors. Real ones are converted too: an operator may change them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (_is_fake(args) and _is_fake(tuple(kwargs.values()))):
            args, kwargs = pytree.tree_map_only(torch.Tensor, self.of, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)


def _is_fake(value: Any) -> bool:
    """Check that an argument holds no real tensor. Every operator asks, and this is quick."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_fake, value))
    if isinstance(value, torch.Tensor):
        return isinstance(value, FakeTensor)
    return not isinstance(value, dict)


class _LinearsOfRows(LinearHook):
    """Passes the rows of a linear's input as one matrix.

    Otherwise PyTorch makes one product per sample if the strides of a three-dimensional input do
    not show that it is a matrix, as after attention with one token. cuBLAS then took 47 us for
    4096x4096 and 16 rows, and 13 us for the matrix.
    """

    def on_linear(self, call: LinearCall) -> torch.Tensor:
        y = call.compute(call.x.reshape(-1, call.x.shape[-1]), call.straight())
        return y.view(*call.x.shape[:-1], y.shape[-1])


def _as_inputs(graph: torch.fx.GraphModule) -> list[torch.Tensor]:
    """Turn the tensors that a graph holds into its last inputs, and return them.

    Raises:
        TypeError: It holds something else, or a tensor subclass.
    """
    constants: dict[int, tuple[torch.Tensor, torch.fx.Node]] = {}
    first = next(node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr"))
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(graph, node.target)
        if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
            kind = type(value).__name__
            raise TypeError(f"a part that holds a {kind} cannot be compiled by itself")
        if id(value) not in constants:
            with graph.graph.inserting_before(first):
                constants[id(value)] = (value, graph.graph.placeholder(f"constant{len(constants)}"))
        node.replace_all_uses_with(constants[id(value)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [value for value, _ in constants.values()]


def _function(
    graph: torch.fx.GraphModule,
    inputs: Sequence[torch.Tensor],
) -> Callable[..., Sequence[torch.Tensor]]:
    """Compile a graph. Equal graphs get the same function."""
    signatures = [_signature(tensor) for tensor in inputs]
    counts = is_recorded() and not _visible
    devices = [tensor.device for tensor in inputs[:1]] if counts else []
    settings = {k: v for each in devices for k, v in backend(each).recorded_settings.items()}
    key = content_key([graph.code, signatures, _same(inputs), settings], length=32)
    if key not in FUNCTIONS:
        without_tensors = torch.fx.GraphModule(nn.Module(), graph.graph)
        with as_if_compiled(False):
            FUNCTIONS[key] = _compiled_by(settings, without_tensors, inputs)
    return FUNCTIONS[key]


def _compiled_by(
    settings: Mapping[str, Any], graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]
) -> Callable[..., Sequence[torch.Tensor]]:
    """Compile with a device's settings for parts; without them if the compiler cannot so."""
    compiled: Callable[..., Sequence[torch.Tensor]]
    try:
        compiled = compile_graph(graph, inputs, settings=settings)
    except Exception as error:
        if not settings:
            raise
        _log.info("a part is compiled without %s: %s", ", ".join(settings), first_line(error))
        compiled = compile_graph(graph, inputs)
    return compiled


def _same(inputs: Sequence[torch.Tensor]) -> list[int]:
    """Return which inputs are the same tensor: a graph may have merged them."""
    places = list(map(id, inputs))
    return [places.index(place) for place in places]
