"""Passes of several inputs through a model; through a streamed one all inputs block by block.

The weights of a block are brought to the device once for all inputs. What blocks return meanwhile
is kept on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from autoquant.models.blocks import BlockChain
from autoquant.models.streaming import stream_of

Forward = Callable[[], torch.Tensor]
"""One forward pass of the model."""
_SAME_WITHIN = 1e-3


def each_output(module: nn.Module, forwards: Sequence[Forward]) -> Iterator[torch.Tensor]:
    """Yield what each forward pass of a model returns, without gradients."""
    chain = chain_of(module, forwards[0]) if forwards else None
    if chain is None:
        for forward in forwards:
            with torch.no_grad():
                result = forward()
            yield result
        return
    stream = stream_of(module)
    assert stream is not None  # it has a chain
    outputs: list[Any] = [None] * len(forwards)
    for index in range(len(chain.blocks)):
        for number, forward in enumerate(forwards):
            with torch.no_grad():
                output = chain.step(index, on_device(outputs[number], stream.device), forward)
            outputs[number] = on_device(output, "cpu")
    for number, forward in enumerate(forwards):
        with torch.no_grad():
            result = after_blocks(chain, on_device(outputs[number], stream.device), forward)
        outputs[number] = None
        yield result


def after_blocks(chain: BlockChain, output: Any, forward: Forward) -> torch.Tensor:
    """Return what a forward pass makes of the last block's output."""
    count = len(chain.blocks)
    with chain.starting_at(count, [output] * count):
        return forward()


def chain_of(module: nn.Module, forward: Forward) -> BlockChain | None:
    """Return the blocks that inputs of a streamed model may pass one by one, or None.

    It is found once for a model. A model that reads a block's output anywhere but in the next block
    gives something else then, and has none.
    """
    stream = stream_of(module)
    if stream is None:
        return None
    if not stream.looked_for_chain:
        seen: list[torch.Tensor] = []

        def noted() -> torch.Tensor:
            seen.append(forward())
            return seen[-1]

        with torch.no_grad():
            chain = BlockChain(module, noted)
            if chain.blocks and not _shares_weights(chain):
                stream.chain = chain if _gives(seen[-1], chain, forward, stream.device) else None
        stream.looked_for_chain = True
    return stream.chain


def _shares_weights(chain: BlockChain) -> bool:
    """Check whether two blocks have a parameter in common."""
    each = [id(parameter) for block in chain.blocks for parameter in block.parameters()]
    return len(each) > len(set(each))


def _gives(expected: torch.Tensor, chain: BlockChain, forward: Forward, device: str) -> bool:
    """Check that a pass block by block gives what one pass gave."""
    output: Any = None
    for index in range(len(chain.blocks)):
        output = on_device(chain.step(index, output, forward), device)
    difference = (after_blocks(chain, output, forward) - expected).float().norm()
    return bool(difference <= _SAME_WITHIN * expected.float().norm())


def on_device(output: Any, device: torch.device | str) -> Any:
    """Return what a block returned, with its tensors on a device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), output)
