"""Models made ready for the compiler, and steps on a GPU made ready to be replayed.

A quantized model that is handed to `torch.compile` as it is compiles each of its blocks anew, although most are alike, and on
every call PyTorch checks each weight's tensor subclass and takes it apart. Here weights are taken apart once, before, and
blocks of the same class become nested regions (`torch.compiler.nested_compile_region`), of which those that turn out alike are
compiled once. On a GPU a step is then captured as one CUDA graph, so that nothing is left between its kernels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.flat import Rebuild, flatten_tensor, unflatten_tensor
from autoquant.candidates.routed import RoutedWeight

_FEWEST_BLOCKS = 2
_WARM_UP_CALLS = 2


def share(module: nn.Module) -> nn.Module:
    """A copy of the module's structure whose parameters and buffers are the original's own tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def ready_to_compile(module: nn.Module, *, regions: bool = True) -> nn.Module:
    """A copy that computes the same from the same tensors, and compiles to the same kernels in less time.

    Args:
        regions: Make repeated blocks nested regions, which the compiler reuses where they are alike.
    """
    ready = share(module)
    blocks = list(_repeated_blocks(ready)) if regions else []
    for block in blocks:
        if all(_nests(parameter) for parameter in block.parameters()):
            kind: Any = type(block)
            block.__class__ = _region_class(kind)
    for owner in list(ready.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, RoutedWeight):
                _take_apart(owner, name, parameter)
    return ready


def compile_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with static shapes.

    Compiled code is kept per code object, so each model gets a copy of its own: otherwise every further plan would add to the
    first one's list, whose guards are tried in turn on each call, until the compiler's recompile limit is hit.
    """
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, dynamic=False)


class GraphedStep:
    """A step on a GPU, captured as a CUDA graph when it is first called with arguments of some shapes.

    Args:
        step: Takes tensors, returns a tensor. It may change tensors that it knows by itself; such changes are made again by
            every replay.
        state: Gives the tensors that a step advances; they are put back after the calls that warm it up.
    """

    def __init__(self, step: Callable[..., torch.Tensor], state: Callable[[], Sequence[torch.Tensor]]) -> None:
        self._step = step
        self._state = state
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]] = {}

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        shapes = tuple(argument.shape for argument in arguments)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture([argument.clone() for argument in arguments])
        graph, inputs, output = self._graphs[shapes]
        for mine, given in zip(inputs, arguments, strict=True):
            mine.copy_(given)
        graph.replay()
        return output

    def _capture(self, inputs: list[torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]:
        """Run on a stream of its own first, as capturing demands; compilation happens there."""
        before = [tensor.clone() for tensor in self._state()]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                self._step(*inputs)
                self._put_back(before)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._step(*inputs)
        return graph, inputs, output

    def _put_back(self, before: Sequence[torch.Tensor]) -> None:
        for tensor, value in zip(self._state(), before, strict=True):
            tensor.copy_(value)


def _repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of lists of modules that hold several of one class; of nested lists, the outer one's."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            members = list(child)
            repeated = [m for m in members if sum(type(other) is type(m) for other in members) >= _FEWEST_BLOCKS]
            blocks = [member for member in repeated if next(member.children(), None) is not None]
            yield from blocks
            for member in members:
                if member not in blocks:
                    yield from _repeated_blocks(member)
        else:
            yield from _repeated_blocks(child)


def _nests(parameter: torch.Tensor) -> bool:
    """Whether the compiler takes what this weight calls in a nested region."""
    if not isinstance(parameter, RoutedWeight):
        return True
    fmt = get_format(parameter.format_id)
    return all(fmt.kernel(kernel).nests for _, kernel in parameter.route)


@functools.cache
def _region_class(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` whose forward pass is a nested region; one class for all, so that they are recognised as alike."""
    region = torch.compiler.nested_compile_region(kind.forward)
    return type(kind.__name__, (kind,), {"forward": region, "__module__": kind.__module__})


def _take_apart(owner: nn.Module, name: str, weight: RoutedWeight) -> None:
    """Replace a parameter by the plain tensors inside, put together again where the forward pass asks for it."""
    parts, rebuild = flatten_tensor(weight)
    del owner._parameters[name]
    for position, part in enumerate(parts):
        owner.register_buffer(_part_name(name, position), part, persistent=False)
    owner.__class__ = _rebuilding_class(type(owner), name, rebuild)


def _part_name(name: str, position: int) -> str:
    return f"{name}_part{position}"


def _rebuilding_class(kind: type[nn.Module], name: str, rebuild: Rebuild) -> type[nn.Module]:
    """`kind` whose attribute `name` is put together from parts."""
    parts = [_part_name(name, position) for position in range(_parts_of(rebuild))]

    def weight(self: nn.Module) -> torch.Tensor:
        return unflatten_tensor(rebuild, [getattr(self, part) for part in parts])

    return type(kind.__name__, (kind,), {name: property(weight), "__module__": kind.__module__})


def _parts_of(rebuild: Rebuild) -> int:
    return 1 if rebuild.kind is None else sum(_parts_of(inner) for inner in rebuild.inner)
