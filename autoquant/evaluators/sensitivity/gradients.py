"""Run a model forward and backward, with its linears replaced and their gradients observed.

A `Place` says how a linear computes, and receives its gradient. Blocks of the model are
checkpointed (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016): only the input of
each block is kept, and the block is computed again when the gradients reach it. So memory holds the
activations of one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoquant.candidates import A16, ACTIVATION_ROUNDING
from autoquant.candidates.calls import LinearCall, LinearHook
from autoquant.errors import QualityError
from autoquant.models.blocks import block_lists
from autoquant.models.outputs import output_tensor, run_on_tokens


class Place(Protocol):
    """Computes one linear in place of the model, and observes its gradient."""

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product `[..., n]` of x `[..., k]`, without the bias."""

    def weight(self) -> torch.Tensor:
        """Return the weight `[n, k]` that gradients are passed back through."""

    def observe(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take the input `[..., k]` and the gradient of the output `[..., n]`."""


class _Observed(torch.autograd.Function):
    """A linear that passes its gradient to its place.

    PyTorch differentiates it even if x needs no gradient, because `_anchor` needs one.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, _anchor: torch.Tensor, place: Place, observed: set[int]
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.place = place
        ctx.observed = observed
        return place.output(x)

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        (gradient,) = gradients
        ctx.observed.add(id(ctx.place))
        with _quick_products():
            ctx.place.observe(x, gradient)
            of_x = gradient @ ctx.place.weight() if ctx.needs_input_grad[0] else None
        return of_x, None, None, None


class PlacedLinears(LinearHook):
    """While active, linears compute as their places say.

    Args:
        places: By the identity of a linear's parameter.

    Attributes:
        computed: Identities of the places that computed something.
        observed: Of those, the ones that a gradient has come back to.
    """

    def __init__(self, places: Mapping[int, Place]) -> None:
        super().__init__()
        self.computed: set[int] = set()
        self.observed: set[int] = set()
        self._places = places
        self._anchor: torch.Tensor | None = None

    def on_linear(self, call: LinearCall) -> torch.Tensor | None:
        place = self._places.get(id(call.weight))
        if place is None:
            return None
        y = self._product(call.x, place)
        return y if call.bias is None else y + call.bias

    def _product(self, x: torch.Tensor, place: Place) -> torch.Tensor:
        self.computed.add(id(place))
        if not torch.is_grad_enabled():
            return place.output(x)
        if self._anchor is None:
            self._anchor = torch.zeros((), device=x.device, requires_grad=True)
        observed: torch.Tensor = _Observed.apply(x, self._anchor, place, self.observed)  # type: ignore[no-untyped-call]
        return observed


def batch_logits(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return logits `[batch, tokens, vocabulary]` of windows `[batch, tokens]`, without a cache."""
    return output_tensor(run_on_tokens(module, ids))


def changed_output(x: torch.Tensor, weight: torch.Tensor, activation: str) -> torch.Tensor:
    """Return x `[..., k]`, rounded as the activation says, times a weight `[n, k]`."""
    return F.linear(x if activation == A16 else rounded_activation(x, activation), weight)


def rounded_activation(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Round each window by itself.

    Some roundings share one scale among all rows of a call, and a call is one window.
    """
    rounding = ACTIVATION_ROUNDING[activation]
    if x.ndim < 3 or len(x) == 1:
        return rounding(x)
    return torch.stack([rounding(window) for window in x])


def backpropagate(
    module: nn.Module,
    ids: torch.Tensor,
    places: Mapping[int, Place],
    seed: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Run windows forward and back. Every place observes the gradient of `sum(seed * logits)`.

    Args:
        ids: Windows `[batch, tokens]`.
        places: By the identity of the parameter.
        seed: Takes the logits `[batch, tokens, vocabulary]` and returns as many numbers, which
            count as constants.

    Raises:
        QualityError: The model does not let gradients through to every linear.
    """
    mode = PlacedLinears(places)
    with _frozen(module), _checkpointed(module, lambda: (nullcontext(), mode)), torch.enable_grad():
        with mode:
            logits = batch_logits(module, ids)
        if logits.requires_grad:
            with torch.no_grad():
                vector = seed(logits.detach())
            logits.backward(vector)  # type: ignore[no-untyped-call]
    if missing := len(mode.computed - mode.observed):
        raise QualityError(
            f"no gradient reaches {missing} of {len(mode.computed)} linears of this model: use"
            " --sensitivity isolated, which needs none"
        )


@contextmanager
def _quick_products() -> Iterator[None]:
    """Inside, the factors of float32 products may be rounded to bfloat16 or TF32.

    Gradients are passed back so. What a layer computes is not: another input would be rounded to
    other integers, whose errors say nothing of those in the logits.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
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
