"""Run a model from one of its blocks on, with the output of the earlier blocks replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from autoquant.candidates.calls import LinearCall, LinearHook


def block_lists(module: nn.Module) -> list[nn.ModuleList | nn.Sequential]:
    """Return a model's lists of several modules, heaviest first. Its blocks are one of them."""
    kinds = (nn.ModuleList, nn.Sequential)
    lists = [child for child in module.modules() if isinstance(child, kinds) and len(child) > 1]
    return sorted(lists, key=lambda blocks: -sum(p.numel() for p in blocks.parameters()))


class BlockChain:
    """The heaviest chain of blocks in a model: each one's output is the next one's input.

    It is found by watching one forward pass. A model without such a list has no blocks, and nothing
    is ever skipped.

    Args:
        module: The model.
        forward: Runs one forward pass of it.
    """

    def __init__(self, module: nn.Module, forward: Callable[[], Any]) -> None:
        self.blocks: tuple[nn.Module, ...] = ()
        self._starts: dict[int, int] = {}
        for blocks in block_lists(module):
            watch = _BlockOrder(list(blocks))
            with watch.hooks(), watch, torch.no_grad():
                forward()
            if watch.is_chain():
                self.blocks = tuple(blocks)
                self._starts = watch.starts
                return

    def start(self, parameter: torch.Tensor) -> int:
        """Return how many blocks may be skipped if only `parameter` changes.

        These are the blocks that end before the first linear on it.
        """
        return self._starts.get(id(parameter), 0)

    @contextmanager
    def capture(self, outputs: list[Any], device: str | None = None) -> Iterator[None]:
        """Collect every block's output, in order, during one forward pass.

        Args:
            device: Where the outputs are kept; None for where they are.
        """

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(_copied(output, device))

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def starting_at(self, index: int, outputs: list[Any]) -> Iterator[None]:
        """Skip the blocks before `index`: they return what `outputs` holds for them."""
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
        """Run one block of a forward pass, and what comes before the first block.

        Args:
            index: The block. The number of blocks runs what comes after the last one instead.
            before: What the block before `index` returned.

        Returns:
            What the block returned, or None after the last one.
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
    """Raised to end a forward pass when the block that was wanted has run."""


class _Replay:
    """Takes the place of a block's `forward`, and returns the same output each time."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return _copied(self._output)


def _copied(output: Any, device: str | None = None) -> Any:
    """Return `output` with copies of its tensors, since what follows a block may work in place."""
    if device is None:
        return tree_map_only(torch.Tensor, torch.clone, output)
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, copy=True), output)


class _BlockOrder(LinearHook):
    """Watches one forward pass: the order of blocks, what they pass on, and where weights are used.

    Attributes:
        starts: How many blocks had ended at the first linear on a parameter, by its identity.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self._blocks = blocks
        self._order: list[int] = []
        self._inputs: list[torch.Tensor | None] = []
        self._outputs: list[torch.Tensor | None] = []
        self.starts: dict[int, int] = {}

    def on_linear(self, call: LinearCall) -> None:
        # A block that has started and not ended must run again; one that has ended need not.
        self.starts.setdefault(id(call.weight), len(self._outputs))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for i, block in enumerate(self._blocks):

            def before(_module: nn.Module, positional: Any, named: Any, i: int = i) -> None:
                self._order.append(i)
                self._inputs.append(_first_tensor(positional or list(named.values())))

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
        """Check that every block ran once, in order, and read what the one before it returned."""
        links = zip(self._outputs[:-1], self._inputs[1:], strict=True)
        count = len(self._blocks)
        once = self._order == list(range(count)) and len(self._outputs) == count
        return once and all(a is not None and a is b for a, b in links)


def _first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (tuple, list)) and value:
        return _first_tensor(value[0])
    return None
