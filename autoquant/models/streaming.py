"""Models larger than their device: weights stay in mapped files, and come to it block by block.

A streamed module is the model itself, whose weights rest on the CPU where the files map them. The
system pages these in and out, so they take no memory of their own. When a block is called, its
weights are brought to the device, and those of the block before go back to where they rested. They
stay until another block is called. So a block's weights are there when gradients pass back through
it, which `torch.utils.checkpoint` computes once more just before.

Parameters keep their identity. Only their data changes, so that whoever knows a weight by its
parameter still does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.devices import backend
from autoquant.models.blocks import BlockChain, block_lists

_ATTRIBUTE = "_autoquant_stream"
_SMALL = 1 / 16
"""A module outside of blocks with up to this share of a block's weights stays on the device."""


class Stream:
    """Brings the weights of a module to its device, those of one unit at a time.

    A unit is a block, or the largest module outside of blocks. Rows of embeddings are looked up
    where they rest. Vectors outside of blocks, buffers and other small tensors stay on the device.

    Args:
        module: Its parameters are on the CPU, best where files map them.
        device: Where it computes.

    Attributes:
        blocks: Lists of blocks; each block is a unit.
        largest_bytes: Of the weights of one block.
        head_bytes: Of the weights of all other units, without embeddings.
        chain: The blocks that inputs may pass one by one, if `looked_for_chain` and there are such.
        most_plan_bytes: How large a plan may be to have room on the device; None for any size.
    """

    most_plan_bytes: int | None = None
    chain: BlockChain | None = None
    looked_for_chain = False

    def __init__(self, module: nn.Module, device: str) -> None:
        self.device = device
        self.blocks = _outer_lists(module)
        self._place = backend(device)
        self._wide = False
        self._here: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
        self._staying: list[nn.Parameter] = []
        self._uploads: dict[int, nn.Parameter] = {}
        blocks = [block for blocks in self.blocks for block in blocks]
        self.largest_bytes = max(map(_bytes, blocks), default=0)
        others = list(_outside(module, set(blocks)))
        streamed = self._units(blocks, others)
        heads = [each for each in streamed[len(blocks) :] if type(each) is not nn.Embedding]
        self.head_bytes = sum(map(_bytes, heads))
        self._stay(module, streamed)
        for unit in streamed:
            unit.forward = _Brought(self, unit)
        setattr(module, _ATTRIBUTE, self)

    def _units(self, blocks: Sequence[nn.Module], others: Sequence[nn.Module]) -> list[nn.Module]:
        """Return the blocks, and those others that are large or share a weight with a unit."""
        units = [*blocks, *filter(self._is_large, others)]
        moving = _identities(units)
        return units + [
            each for each in others if each not in units and moving & _identities([each])
        ]

    def _is_large(self, module: nn.Module) -> bool:
        return type(module) is nn.Embedding or _bytes(module) > _SMALL * self.largest_bytes

    def _stay(self, module: nn.Module, units: Sequence[nn.Module]) -> None:
        """Bring to the device what is in no unit."""
        moving = _identities(units)
        for parameter in module.parameters():
            if id(parameter) not in moving:
                parameter.data = parameter.data.to(self.device)
                self._staying.append(parameter)
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = None if buffer is None else buffer.to(self.device)

    def bring(self, unit: nn.Module) -> None:
        """Have the weights of a unit on the device, and those of no other.

        No function mode sees it: to one that watches a model, this is no use of its weights.
        """
        with torch._C.DisableTorchFunction():
            self._bring(unit)

    def _bring(self, unit: nn.Module) -> None:
        wanted = {id(parameter): parameter for parameter in unit.parameters()}
        for key in [key for key in self._here if key not in wanted]:
            parameter, rest = self._here.pop(key)
            parameter.data = rest
        for key, parameter in wanted.items():
            if key not in self._here:
                rest = parameter.data
                parameter.data = self._brought(rest)
                self._here[key] = parameter, rest

    def _brought(self, rest: torch.Tensor) -> torch.Tensor:
        there = brought(rest, self.device)
        return there.float() if self._wide and there.dtype in _NARROW else there

    def let_go(self) -> None:
        """Have no weights on the device but those that stay."""
        for parameter, rest in self._here.values():
            parameter.data = rest
        self._here.clear()

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Inside, weights are widened to float32 as they are brought."""
        self.let_go()
        narrow = [(each, each.data) for each in self._staying if each.dtype in _NARROW]
        self._wide = True
        try:
            for parameter, data in narrow:
                parameter.data = data.float()
            yield
        finally:
            self.let_go()
            self._wide = False
            for parameter, data in narrow:
                parameter.data = data

    def rows(self, embedding: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        """Look rows up where the weight is, and return them on the device."""
        weight = embedding.weight
        found = F.embedding(ids.to(weight.device), weight).to(self.device)
        return found.float() if self._wide else found

    def uploaded(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return a weight on the device, one for all copies of the model that have it there."""
        if parameter.device.type == self._place.type:
            return parameter
        known = self._uploads.get(id(parameter))
        if known is None:
            known = nn.Parameter(self._place.upload(parameter.data), requires_grad=False)
            self._uploads[id(parameter)] = known
        return known

    def forget_uploads(self) -> None:
        """Free the weights that `uploaded` keeps for further copies."""
        self._uploads.clear()


_NARROW = (torch.bfloat16, torch.float16)


class _Brought:
    """Takes the place of a unit's `forward`, and brings the weights first."""

    def __init__(self, stream: Stream, unit: nn.Module) -> None:
        self.own: Callable[..., Any] | None = vars(unit).get("forward")
        self._stream, self._unit = stream, unit
        self._forward = unit.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if type(self._unit) is nn.Embedding and self._unit.max_norm is None:
            return self._stream.rows(self._unit, args[0] if args else kwargs["input"])
        self._stream.bring(self._unit)
        return self._forward(*args, **kwargs)


def stream_of(module: nn.Module) -> Stream | None:
    """Return what streams a module, or None."""
    found: Stream | None = vars(module).get(_ATTRIBUTE)
    return found


def without_stream(module: nn.Module, tensors: dict[int, Any]) -> nn.Module:
    """Return a deep copy of a streamed module that is none. Its weights rest on the CPU.

    Args:
        tensors: What the copy shares with the module, by identity.
    """
    stream = stream_of(module)
    assert stream is not None
    stream.let_go()
    copied = copy.deepcopy(module, {**tensors, id(stream): None})
    vars(copied).pop(_ATTRIBUTE)
    for part in copied.modules():
        brought = vars(part).get("forward")
        if isinstance(brought, _Brought):
            del part.forward
            if brought.own is not None:
                part.forward = brought.own
    return copied


def place_whole(module: nn.Module, stream: Stream) -> None:
    """Bring all weights of a copy to the device that still rest on the CPU.

    Those outside of blocks are there once for all copies.
    """
    inside = {id(each) for blocks in _outer_lists(module) for each in blocks.parameters()}
    placed: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or parameter.device.type == torch.device(stream.device).type:
                continue
            if id(parameter) not in placed:
                fresh = id(parameter) in inside
                placed[id(parameter)] = (
                    nn.Parameter(backend(stream.device).upload(parameter.data), requires_grad=False)
                    if fresh
                    else stream.uploaded(parameter)
                )
            owner._parameters[name] = placed[id(parameter)]


def on_meta(module: nn.Module) -> nn.Module:
    """Put the tensors of a copy on the meta device, in place: shapes without values."""
    made: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            if parameter is not None:
                owner._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = made.setdefault(id(buffer), buffer.to("meta"))
    return module


def share_blocks(module: nn.Module, most_bytes: int) -> str:
    """Give the blocks of a copy the weights of the first ones, in place.

    The model then takes as long and gives nonsense. Blocks share with one of the same make, that
    is, with parameters of the same names, shapes and dtypes.

    Args:
        most_bytes: What the blocks that keep their weights take, but at least one of each make.

    Returns:
        Words on how many blocks keep their weights, as "2 of 32 blocks".
    """
    kept: dict[tuple[Any, ...], list[nn.Module]] = {}
    blocks = [block for blocks in _outer_lists(module) for block in blocks]
    left, turn, own = most_bytes, 0, 0
    for block in blocks:
        alike = kept.setdefault(_make(block), [])
        if not alike or _bytes(block) <= left:
            alike.append(block)
            left -= _bytes(block)
            own += 1
            continue
        source = dict(alike[turn % len(alike)].named_modules())
        for name, part in block.named_modules():
            part._parameters.update(source[name]._parameters)
        turn += 1
    return f"{own} of {len(blocks)} blocks"


def _make(block: nn.Module) -> tuple[Any, ...]:
    facts = [(name, each.shape, each.dtype) for name, each in block.named_parameters()]
    return type(block), tuple(facts)


def brought(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor on a device, copied as quickly as can be if it is elsewhere."""
    place = backend(device)
    return tensor if tensor.device.type == place.type else place.upload(tensor)


def _identities(modules: Sequence[nn.Module]) -> set[int]:
    """Return the identities of the parameters of modules."""
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _outer_lists(module: nn.Module) -> list[nn.ModuleList | nn.Sequential]:
    """Return the lists of blocks that lie in no other list of blocks."""
    found: list[nn.ModuleList | nn.Sequential] = []
    inside: set[nn.Module] = set()
    for blocks in block_lists(module):
        if blocks not in inside:
            found.append(blocks)
            inside.update(blocks.modules())
    return found


def _outside(module: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the largest modules that can be called and contain no block."""
    for child in module.children():
        if child in blocks:
            continue
        if type(child).forward is not nn.Module.forward and blocks.isdisjoint(child.modules()):
            yield child
        else:
            yield from _outside(child, blocks)
