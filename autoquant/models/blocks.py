"""Run a model from one of its blocks on; an earlier run supplies what came before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from autoquant.candidates.calls import LINEAR_FUNCTIONS, linear_arguments


def block_lists(module: nn.Module) -> list[nn.ModuleList | nn.Sequential]:
    """Return a model's lists of several modules, heaviest first. One may hold its blocks."""
    lists = [
        child
        for child in module.modules()
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1
    ]
    return sorted(lists, key=lambda blocks: -sum(p.numel() for p in blocks.parameters()))


class BlockChain:
    """The heaviest list of blocks of a model in which each block reads the output before it.

    One forward pass is watched to find it. A model without such a list has no blocks, and nothing
    is ever skipped.

    Args:
        module: The model.
        forward: Runs one forward pass of it.
    """

    def __init__(self, module: nn.Module, forward: Callable[[], Any]) -> None:
        self.blocks: tuple[nn.Module, ...] = ()
        self._starts: dict[int, int] = {}
        for blocks in block_lists(module):
            watch = _Watch(list(blocks))
            with watch.hooks(), watch, torch.no_grad():
                forward()
            if watch.is_chain():
                self.blocks = tuple(blocks)
                self._starts = watch.starts
                return

    def start(self, parameter: torch.Tensor) -> int:
        """Count the blocks that run before `parameter` is used.

        They may be skipped if only that parameter changes.
        """
        return self._starts.get(id(parameter), 0)

    @contextmanager
    def capture(self, outputs: list[Any]) -> Iterator[None]:
        """Collect every block's output, in order, during one forward pass."""
        handles = [
            block.register_forward_hook(lambda _m, _a, output: outputs.append(_copied(output)))
            for block in self.blocks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def starting_at(self, index: int, outputs: list[Any]) -> Iterator[None]:
        """Skip the blocks before `index` inside: `outputs` holds what they return."""
        skipped = self.blocks[:index]
        own = [vars(block).get("forward") for block in skipped]
        for block, output in zip(skipped, outputs[:index], strict=True):
            block.forward = _Replay(output)
        try:
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def step(self, index: int, before: Any, forward: Callable[[], Any]) -> Any:
        """Run one block of a forward pass, or what follows the last block.

        What comes before all blocks runs, too.

        Args:
            index: Which block; the number of blocks for what follows the last one.
            before: What the block before `index` returned.

        Returns:
            What the block returned; None for what follows the last one.
        """
        given: list[Any] = []

        def end(_module: nn.Module, _args: Any, output: Any) -> None:
            given.append(_copied(output))
            raise _Ended

        hooks = [block.register_forward_hook(end) for block in self.blocks[index : index + 1]]
        try:
            with self.starting_at(index, [before] * index), suppress(_Ended):
                forward()
        finally:
            for hook in hooks:
                hook.remove()
        return given[0] if given else None


class _Ended(Exception):
    """Raised when the block that was to run has run."""


class _Replay:
    """A forward pass that returns a copy of what it was made with."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return _copied(self._output)


def _copied(output: Any) -> Any:
    """Return `output` with its tensors cloned, since what follows a block may work in place."""
    return tree_map_only(torch.Tensor, torch.clone, output)


class _Watch(TorchFunctionMode):
    """Watches a forward pass: the order of blocks, what they return, where weights are used."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self._blocks = blocks
        self._order: list[int] = []
        self._inputs: list[torch.Tensor | None] = []
        self._outputs: list[torch.Tensor | None] = []
        self.starts: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LINEAR_FUNCTIONS:
            # A block that has started and not ended must run again; one that has ended need not.
            self.starts.setdefault(id(linear_arguments(args, kwargs)[1]), len(self._outputs))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for i, block in enumerate(self._blocks):

            def before(_module: nn.Module, positional: Any, named: Any, i: int = i) -> None:
                self._order.append(i)
                self._inputs.append(
                    _first_tensor(positional) if positional else _first_tensor(list(named.values()))
                )

            def after(_module: nn.Module, _args: Any, output: Any) -> None:
                self._outputs.append(_first_tensor(output))

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def is_chain(self) -> bool:
        """Whether every block ran once, in order, and read what the one before it returned."""
        links = zip(self._outputs[:-1], self._inputs[1:], strict=True)
        once = self._order == list(range(len(self._blocks))) and len(self._outputs) == len(
            self._blocks
        )
        return once and all(a is not None and a is b for a, b in links)


def _first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (tuple, list)) and value:
        return _first_tensor(value[0])
    return None
