"""The state that the steps of a decoder share: a static cache, and where in it the next tokens go.

Its tensors do not move, so that a step can be replayed as a CUDA graph. One position serves all
layers. With one for each, as in transformers' static cache, a step launches another kernel in every
layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of a step go.

    Attributes:
        index: Places in the cache, `[tokens]`.
        positions: Position ids, `[batch, tokens]`.
    """

    index: torch.Tensor
    positions: torch.Tensor


class StepState:
    """The position of a decoder, and its masks.

    Args:
        batch: How many sequences.
        length: How many places the cache has.
        padded: Sequences may begin with padding.

    Attributes:
        filled: How many places of the cache are filled, `[]`.
        kept: Which token of the step logits are wanted for, `[1]`.
        padding: 0 for places that hold padding, `[batch, length]`, or None.
        now: The places of the step that runs.
    """

    def __init__(self, batch: int, length: int, device: torch.device, *, padded: bool) -> None:
        self.filled = torch.zeros((), dtype=torch.long, device=device)
        self.kept = torch.zeros(1, dtype=torch.long, device=device)
        self.padding = (
            torch.ones(batch, length, dtype=torch.long, device=device) if padded else None
        )
        self.now: Places | None = None
        self._batch = batch
        self._all = torch.arange(length, device=device)
        self._places: dict[int, Places] = {}

    def tensors(self) -> list[torch.Tensor]:
        """Return what a step changes, other than keys and values."""
        return [self.filled, *(places.positions for places in self._places.values())]

    def start(self, mask: torch.Tensor | None) -> None:
        """Go back to the beginning; `mask` is 0 for the prompt's padding, `[batch, tokens]`."""
        self.filled.zero_()
        if self.padding is not None:
            self.padding.fill_(1)
            if mask is not None:
                self.padding[:, : mask.shape[1]] = mask

    def rewind(self, tokens: int) -> None:
        """Go back behind the first tokens, whose position ids are 0, 1, ..."""
        self.filled.fill_(tokens)
        self._of(1).positions.fill_(tokens)
        self.kept.zero_()

    def place(self, positions: torch.Tensor, *, kept: int) -> None:
        """Set the position ids `[batch, tokens]` of the next step, and which token needs logits."""
        self._of(positions.shape[1]).positions.copy_(positions)
        self.kept.fill_(kept)

    def take_back(self, tokens: int) -> None:
        """Let the last tokens be overwritten by the next."""
        if tokens:
            self.filled.sub_(tokens)

    def begin(self, tokens: int) -> Places:
        """Find where the tokens of a step go."""
        places = self.now = self._of(tokens)
        torch.add(self._all[:tokens], self.filled, out=places.index)
        return places

    def end(self, places: Places) -> None:
        """Go on behind the tokens of a step."""
        tokens = len(places.index)
        self.filled.add_(tokens)
        # The next token follows by itself. For chunks of a prompt, `place` says where they are.
        if tokens == 1:
            places.positions.add_(1)

    def mask(self, places: Places) -> torch.Tensor:
        """Return which places each token of a step sees, bool `[batch, 1, tokens, length]`."""
        seen = (self._all <= places.index[:, None])[None, None]
        if self.padding is not None:
            seen = seen & (self.padding[:, None, None, :] != 0)
        return seen.expand(self._batch, -1, -1, -1)

    @contextmanager
    def set_aside(self, tokens: int) -> Iterator[None]:
        """Inside, steps of `tokens` tokens fit into the cache.

        Afterwards the position is what it was.
        """
        self._of(tokens)
        before = [tensor.clone() for tensor in self.tensors()]
        self.filled.clamp_(max=len(self._all) - tokens)
        try:
            yield
        finally:
            for tensor, value in zip(self.tensors(), before, strict=True):
                tensor.copy_(value)

    def _of(self, tokens: int) -> Places:
        if tokens not in self._places:
            index = self._all[:tokens].clone()
            self._places[tokens] = Places(index, index.expand(self._batch, tokens).clone())
        return self._places[tokens]


def static_cache(model: nn.Module, state: StepState) -> Any:
    """Return a cache whose layers all hold every place: windows are left to the mask.

    Raises:
        TypeError: The model keeps something else than keys and values.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    length = len(state._all)
    cache = StaticCache(config=model.config, max_cache_len=length)
    if other := {
        type(layer).__name__
        for layer in cache.layers
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer)
    }:
        raise TypeError(f"it keeps a {', '.join(sorted(other))}")

    class Layer(StaticLayer):  # type: ignore[misc]
        """Keys and values at the places of the step that runs."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            places = state.now
            assert places is not None  # a step has begun
            self.keys.index_copy_(2, places.index, key_states)
            self.values.index_copy_(2, places.index, value_states)
            return self.keys, self.values

    cache.layers = [Layer(max_cache_len=length) for _ in cache.layers]
    for layer in cache.layers:
        layer.cumulative_length = state.filled
    return cache


def takes_made_mask(model: Any) -> bool:
    """Check whether a model takes a mask `[batch, 1, tokens, length]` instead of its padding.

    Models that use windows in some layers make masks of several kinds.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = (
        getattr(config, "sliding_window", None)
        if not getattr(config, "layer_types", None)
        else None
    )
    return kinds == {"full_attention"} and not windows and config._attn_implementation == "sdpa"
