"""Run a model forward and backward, with its linears replaced and their gradients observed.

A `Place` says how a linear computes, and receives its gradient. Where the activations of all blocks
would not fit, blocks are checkpointed (Chen et al., "Training Deep Nets with Sublinear Memory
Cost", 2016): only the input of each block is kept, and the block is computed again when the
gradients reach it. So memory holds the activations of one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from autoquant.candidates import A16
from autoquant.candidates.calls import (
    LinearCall,
    LinearHook,
    LookupCall,
    product,
    product_back,
)
from autoquant.devices import backend
from autoquant.devices.memory import available_bytes
from autoquant.errors import QualityError
from autoquant.evaluators.passes import Forward, after_blocks, chain_of
from autoquant.evaluators.sensitivity.base import Change
from autoquant.models.blocks import BlockChain, block_lists
from autoquant.models.loaded import device_of
from autoquant.models.outputs import output_tensor, run_on_tokens
from autoquant.models.streaming import stream_of

Seed = Callable[[torch.Tensor], torch.Tensor]
"""Takes logits, and returns the gradient with respect to them."""
_FREE_SHARE = 1 / 4
"""Of the memory that is free, for activations of all blocks."""
_KEPT_SHARE = 1 / 4
"""Of the host's memory, for the inputs of blocks."""


PlaceKey = tuple[int, bool]
"""The identity of a parameter, and whether its rows are looked up."""


class Place(Protocol):
    """Computes one linear in place of the model, and observes its gradient.

    If it is of experts, `ends` says which rows are of which expert, as for
    `autoquant.candidates.calls.product`. The input of a table is the ids `[...]` of its rows, and
    its output `[..., k]`.
    """

    @property
    def key(self) -> PlaceKey:
        """What the place stands for."""

    def output(self, x: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
        """Return the product `[..., n]` of x `[..., k]`, without the bias."""

    def weight(self) -> torch.Tensor:
        """Return the weight `[n, k]` or `[experts, n, k]` that gradients pass back through."""

    def observe(self, x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor | None) -> None:
        """Take the input `[..., k]` and the gradient of the output `[..., n]`."""


class _Observed(torch.autograd.Function):
    """A linear that passes its gradient to its place.

    PyTorch differentiates it even if x needs no gradient, because `_anchor` needs one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        _anchor: torch.Tensor,
        place: Place,
        ends: torch.Tensor | None,
        observed: set[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.place, ctx.ends = place, ends
        ctx.observed = observed
        return place.output(x, ends)

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        (gradient,) = gradients
        ctx.observed.add(id(ctx.place))
        with _quick_products():
            ctx.place.observe(x, gradient, ctx.ends)
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = product_back(gradient, ctx.place.weight(), ctx.ends)
        return of_x, None, None, None, None


class PlacedLinears(LinearHook):
    """While active, linears compute as their places say.

    Args:
        places: Each for one use of a parameter.

    Attributes:
        computed: Identities of the places that computed something.
        observed: Of those, the ones that a gradient has come back to.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        super().__init__()
        self.computed: set[int] = set()
        self.observed: set[int] = set()
        self._places = {place.key: place for place in places}
        self._anchor: torch.Tensor | None = None

    def on_linear(self, call: LinearCall) -> torch.Tensor | None:
        place = self._places.get((id(call.weight), False))
        if place is None:
            return None
        y = self._product(call.x, place, call.ends)
        return y if call.bias is None else y + call.bias

    def on_lookup(self, call: LookupCall) -> torch.Tensor | None:
        place = self._places.get((id(call.table), True))
        return None if place is None else self._product(call.ids, place, None)

    def _product(self, x: torch.Tensor, place: Place, ends: torch.Tensor | None) -> torch.Tensor:
        self.computed.add(id(place))
        if not torch.is_grad_enabled():
            return place.output(x, ends)
        if self._anchor is None:
            self._anchor = torch.zeros((), device=x.device, requires_grad=True)
        observed: torch.Tensor = _Observed.apply(x, self._anchor, place, ends, self.observed)  # type: ignore[no-untyped-call]
        return observed


def batch_logits(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return logits `[batch, tokens, vocabulary]` of windows `[batch, tokens]`, without a cache."""
    return output_tensor(run_on_tokens(module, ids))


def changed_output(
    x: torch.Tensor, weight: torch.Tensor, change: Change, ends: torch.Tensor | None
) -> torch.Tensor:
    """Return x `[..., k]`, rounded as the change says, times a weight."""
    rounded = x if change.activation == A16 else rounded_activation(x, change)
    return product(rounded, weight, ends)


def rounded_activation(x: torch.Tensor, change: Change) -> torch.Tensor:
    """Round each window by itself.

    Some roundings share one scale among all rows of a call, and a call is one window.
    """
    rounding = change.rounding
    if x.ndim < 3 or len(x) == 1:
        return rounding(x)
    return torch.stack([rounding(window) for window in x])


def backpropagate(
    module: nn.Module,
    ids: torch.Tensor,
    places: Sequence[Place],
    seed: Seed,
) -> None:
    """Run windows forward and back. Every place observes the gradient of `sum(seed * logits)`.

    Args:
        ids: Windows `[batch, tokens]`.
        places: Each for one use of a parameter.
        seed: Takes the logits `[batch, tokens, vocabulary]` and returns as many numbers, which
            count as constants.

    Raises:
        QualityError: The model does not let gradients through to every linear.
    """
    mode = PlacedLinears(places)
    keeping = (
        nullcontext()
        if _fits(module, ids.numel())
        else _checkpointed(module, lambda: (nullcontext(), mode))
    )
    with _frozen(module), keeping, torch.enable_grad():
        with mode:
            logits = batch_logits(module, ids)
        if logits.requires_grad:
            with torch.no_grad():
                vector = seed(logits.detach())
            logits.backward(vector)  # type: ignore[no-untyped-call]
    _check_observed(mode)


def backpropagate_each(
    module: nn.Module,
    batches: Sequence[torch.Tensor],
    places: Sequence[Place],
    seed_of: Callable[[int], Seed],
    ended: Callable[[], None] = lambda: None,
) -> None:
    """Run several batches forward and back, as `backpropagate` does with each.

    Batches pass the blocks of a streamed model together, as many as there is memory for.

    Args:
        seed_of: Returns the seed of a batch by its number, before the batch is run.
        ended: Called when a batch has passed back through the model, or through a part of it.

    Raises:
        QualityError: The model does not let gradients through to every linear.
    """
    chain = chain_of(module, partial(batch_logits, module, batches[0]))
    if chain is None:
        for number, batch in enumerate(batches):
            backpropagate(module, batch, places, seed_of(number))
            ended()
        return
    together = _batches_together(module, chain, batches[0])
    for start in range(0, len(batches), together):
        numbers = range(start, min(start + together, len(batches)))
        with _frozen(module):
            _by_blocks(
                chain,
                {number: partial(batch_logits, module, batches[number]) for number in numbers},
                places,
                seed_of,
                ended,
            )


def _batches_together(module: nn.Module, chain: BlockChain, batch: torch.Tensor) -> int:
    """Return of how many batches the inputs of all blocks may be kept in the host's memory."""
    outputs: list[Any] = []
    with torch.no_grad(), chain.capture(outputs):
        batch_logits(module, batch)
    tensors = [each for output in outputs for each in tree_leaves(output)]
    size = sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
    place = backend(device_of(module))
    shared = place.free_bytes() is None  # with the host
    room_bytes = (place.room_bytes() if shared else available_bytes()) or 0
    return max(1, int(_KEPT_SHARE * room_bytes) // max(size, 1))


def _by_blocks(
    chain: BlockChain,
    forwards: Mapping[int, Forward],
    places: Sequence[Place],
    seed_of: Callable[[int], Seed],
    ended: Callable[[], None],
) -> None:
    """Run batches forward and back through one block after the other.

    Args:
        forwards: The forward pass of each batch, by its number.
    """
    mode = PlacedLinears(places)
    inputs: list[dict[int, Any]] = [dict.fromkeys(forwards)]
    for index in range(len(chain.blocks)):
        with torch.no_grad(), mode:
            inputs.append(
                {
                    number: _kept(chain.step(index, _brought(before), forwards[number]))
                    for number, before in inputs[-1].items()
                }
            )
    gradients: dict[int, Any] = {}
    for number, before in inputs.pop().items():
        seed, leaf = seed_of(number), _brought(before)
        with torch.enable_grad(), mode:
            logits = after_blocks(chain, leaf, forwards[number])
        if logits.requires_grad:
            with torch.no_grad():
                vector = seed(logits.detach())
            logits.backward(vector)  # type: ignore[no-untyped-call]
        gradients[number] = _gradients_of(leaf)
        ended()
    for index in reversed(range(len(chain.blocks))):
        for number, before in inputs.pop().items():
            leaf = _brought(before)
            with torch.enable_grad(), mode:
                output = chain.step(index, leaf, forwards[number])
            _pass_back(output, gradients[number])
            gradients[number] = _gradients_of(leaf)
            ended()
    _check_observed(mode)


class _Kept:
    """A tensor on the CPU, with the device that it is computed with."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.device = tensor.detach().cpu(), tensor.device


def _kept(output: Any) -> Any:
    return tree_map_only(torch.Tensor, _Kept, output)


def _brought(kept: Any) -> Any:
    """Return kept tensors on their devices, as leaves that collect gradients if they can."""

    def leaf(each: _Kept) -> torch.Tensor:
        tensor = each.tensor.to(each.device, copy=True)
        return tensor.requires_grad_(tensor.is_floating_point())

    return tree_map_only(_Kept, leaf, kept)


def _gradients_of(leaves: Any) -> list[torch.Tensor | None]:
    """Return the gradients of a block's input, on the CPU."""
    return [
        None if each.grad is None else each.grad.cpu()
        for each in tree_leaves(leaves)
        if isinstance(each, torch.Tensor)
    ]


def _pass_back(output: Any, gradients: Sequence[torch.Tensor | None]) -> None:
    tensors = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor)]
    pairs = [
        (tensor, gradient.to(tensor.device))
        for tensor, gradient in zip(tensors, gradients, strict=True)
        if gradient is not None and tensor.requires_grad
    ]
    if pairs:
        torch.autograd.backward(
            [tensor for tensor, _ in pairs], [gradient for _, gradient in pairs]
        )


def _check_observed(mode: PlacedLinears) -> None:
    if missing := len(mode.computed - mode.observed):
        raise QualityError(
            f"no gradient reaches {missing} of {len(mode.computed)} linears of this model: use"
            " --sensitivity isolated, which needs none"
        )


@contextmanager
def scoring_products(module: nn.Module) -> Iterator[None]:
    """Inside, what layers compute in float32 is as precise as scoring on the device needs it.

    A GPU multiplies several times as fast with factors rounded to TF32, 11 bits of precision. A
    model of 16-bit weights rounds further itself, all but float16's to 8 bits.
    """
    with _products(backend(device_of(module)).scoring_precision):
        yield


def _quick_products() -> AbstractContextManager[None]:
    """Return what has the factors of float32 products rounded to bfloat16 or TF32.

    Gradients are passed back so. What a layer computes is not rounded to bfloat16: another input
    would be rounded to other integers, whose errors say nothing of those in the logits.
    """
    return _products("medium")


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter collects a gradient."""
    thawed = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


def _fits(module: nn.Module, rows: int) -> bool:
    """Check whether the activations of all blocks take little of the memory that is left.

    What a linear reads and returns is counted in float32, and once more for all else that is kept.
    """
    blocks = next(iter(block_lists(module)), ())
    if stream_of(module) is not None or not blocks:
        return False
    width = sum(
        sum(parameter.shape)
        for block in blocks
        for parameter in block.parameters()
        if parameter.ndim == 2
    )
    room_bytes = backend(device_of(module)).room_bytes()
    return room_bytes is not None and 2 * 4 * rows * width <= _FREE_SHARE * room_bytes


Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


@contextmanager
def _checkpointed(module: nn.Module, contexts: Contexts) -> Iterator[None]:
    """Inside, the blocks of the model (if it has a list of them) keep only their inputs."""
    blocks = list(next(iter(block_lists(module)), ()))
    own = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                determinism_check="none",
                context_fn=contexts,
            )
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward
