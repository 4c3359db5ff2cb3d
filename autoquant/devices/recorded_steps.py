"""A step on the host, recorded as a list of calls and replayed without the model's own code.

Between two compiled functions a model runs some fifty lines of Python, which take as long as a
product of a small model. They do the same in every step, as they must for a CUDA graph. So one step
is watched, and the calls that it made are all that later steps make.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[..., Sequence[torch.Tensor]]
_MOST_INPUTS = 64
"""Tokens of a step that is recorded. In a longer one, the model's own code takes little time."""
_READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)
"""Ways to a tensor's numbers that no operator is called for."""
_log = logging.getLogger(__name__)


def call_as_one(
    function: Function, given: Sequence[torch.Tensor], constants: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Call a compiled function. A step that is recorded notes it as one call.

    Args:
        constants: Its last inputs, which are the same in every step.
    """
    if _active.watcher is None:
        return function(*given, *constants)
    return _active.watcher.function(function, given, constants)


def is_recorded() -> bool:
    """Check whether a step is being recorded: one of few tokens, in which every call counts."""
    return _active.watcher is not None


class RecordedStep:
    """A step that is recorded when it is first called with arguments of some kind.

    A step without compiled functions runs as it is, as does one that reads a tensor's numbers.

    Args:
        step, state: As for `Backend.graphed`. The tensors of `state` are put back after the calls
            that record the step.
    """

    def __init__(
        self, step: Callable[..., torch.Tensor], state: Callable[[], Sequence[torch.Tensor]]
    ) -> None:
        self._step, self._state = step, state
        self._recorded: dict[tuple[Any, ...], Callable[..., torch.Tensor]] = {}

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        if sum(each.numel() for each in arguments) > _MOST_INPUTS:
            return self._step(*arguments)
        kind = tuple((each.dtype, each.shape, each.stride()) for each in arguments)
        if kind not in self._recorded:
            self._recorded[kind] = self._record(arguments)
        return self._recorded[kind](*arguments)

    def _record(self, arguments: Sequence[torch.Tensor]) -> Callable[..., torch.Tensor]:
        before = [tensor.clone() for tensor in self._state()]
        # A seed gives the same random numbers in every call, also in the first.
        with torch.random.fork_rng(devices=[]):
            with _watched(_Watch(arguments)) as watch:  # not as a mode: parts are compiled inside
                self._step(*arguments)
            self._put_back(before)
            if not watch.functions:
                return self._step
            with _watched(_Watch(arguments)) as watch, watch, _Reading(watch):
                output = self._step(*arguments)
            self._put_back(before)
        if watch.reads:
            _log.info("steps run through the model's code, which reads numbers by %s", watch.reads)
            return self._step
        return watch.replay(output)

    def _put_back(self, before: Sequence[torch.Tensor]) -> None:
        for tensor, value in zip(self._state(), before, strict=True):
            tensor.copy_(value)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators, and compiled functions as one call each.

    Attributes:
        functions: How many compiled functions were called.
        reads: What made numbers of a tensor known to Python, or an empty string.
    """

    def __init__(self, arguments: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.functions, self.reads = 0, ""
        self._graph, self._held = torch.fx.Graph(), nn.Module()
        self._nodes: dict[int, torch.fx.Node] = {}
        self._alive: list[torch.Tensor] = []  # so that no other tensor gets the same id
        for number, tensor in enumerate(arguments):
            self._note(tensor, self._graph.placeholder(f"argument{number}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads = str(func)
        of_nodes = pytree.tree_map_only(torch.Tensor, self._node_of, (args, kwargs or {}))
        self._note_all(result, self._graph.call_function(func, *of_nodes))
        return result

    def function(
        self,
        function: Function,
        given: Sequence[torch.Tensor],
        constants: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        """Call a compiled function, and note it."""
        with torch._C._DisableTorchDispatch():
            results = function(*given, *constants)

        def compiled(*now: torch.Tensor) -> Sequence[torch.Tensor]:
            return function(*now, *constants)

        compiled.__name__ = compiled.__qualname__ = f"compiled{self.functions}"
        self.functions += 1
        nodes = tuple(map(self._node_of, given))
        self._note_all(list(results), self._graph.call_function(compiled, nodes))
        return results

    def replay(self, output: torch.Tensor) -> Callable[..., torch.Tensor]:
        """Return what makes the noted calls again, and returns what was `output`."""
        self._graph.output(self._node_of(output))
        made: Callable[..., torch.Tensor] = torch.fx.GraphModule(self._held, self._graph).forward
        return made

    def _note_all(self, result: Any, node: torch.fx.Node) -> None:
        if isinstance(result, torch.Tensor):
            return self._note(result, node)
        for number, each in enumerate(result if isinstance(result, (list, tuple)) else ()):
            if isinstance(each, torch.Tensor):
                self._note(each, self._graph.call_function(_item, (node, number)))
        return None

    def _note(self, tensor: torch.Tensor, node: torch.fx.Node) -> None:
        # What is changed in place stays what it was.
        if self._nodes.setdefault(id(tensor), node) is node:
            self._alive.append(tensor)

    def _node_of(self, tensor: torch.Tensor) -> torch.fx.Node:
        """Return what stands for a tensor. One that the step did not make is held for it."""
        if id(tensor) not in self._nodes:
            name = f"held{len(self._alive)}"
            self._held.register_buffer(name, tensor)
            self._note(tensor, self._graph.get_attr(name))
        return self._nodes[id(tensor)]


def _item(results: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    return results[number]


class _Reading(TorchFunctionMode):
    """Tells a watch of numbers that are read without an operator."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self._watch.reads = func.__name__
        return func(*args, **(kwargs or {}))


class _Active(threading.local):
    """What watches the compiled functions that this thread calls."""

    watcher: _Watch | None = None


_active = _Active()


@contextmanager
def _watched(watcher: _Watch) -> Iterator[_Watch]:
    """Inside, compiled functions are called by the watcher."""
    _active.watcher = watcher
    try:
        yield watcher
    finally:
        _active.watcher = None
