"""The state that the steps of a decoder share: a static cache, and where in it the next tokens go.

Its tensors do not move, so that a step can be replayed as a CUDA graph. One position serves all
layers. With one for each, as in transformers' static cache, a step launches another kernel in every
layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autoquant.records import KvCache
from autoquant.runtime.generate.kv_codes import Codes, codes_of


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
        reads_codes: The attention of the step that runs reads codes of keys and values.
    """

    def __init__(self, batch: int, length: int, device: torch.device, *, padded: bool) -> None:
        self.filled = torch.zeros((), dtype=torch.long, device=device)
        self.kept = torch.zeros(1, dtype=torch.long, device=device)
        self.padding = (
            torch.ones(batch, length, dtype=torch.long, device=device) if padded else None
        )
        self.now: Places | None = None
        self.reads_codes = False
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


def other_layers(config: Any) -> list[str]:
    """Return the kinds of layers of a model's cache that keep no keys and values."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    layers = StaticCache(config=config, max_cache_len=1).layers
    kept = (StaticLayer, StaticSlidingWindowLayer)
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in kept})


def static_cache(model: Any, state: StepState, kind: KvCache | None = None) -> Any:
    """Return a cache whose layers all hold every place: windows are left to the mask.

    Args:
        kind: Keep codes instead of the numbers.

    Raises:
        TypeError: The model keeps something else than keys and values.
    """
    from transformers import StaticCache

    if other := other_layers(model.config):
        raise TypeError(f"it keeps a {', '.join(other)}")
    length = len(state._all)
    cache = StaticCache(config=model.config, max_cache_len=length)
    layer_class = _layer_of_numbers() if kind is None else _layer_of_codes()
    cache.layers = [layer_class(max_cache_len=length) for _ in cache.layers]
    for layer in cache.layers:
        layer.cumulative_length = state.filled
        layer.state, layer.kind = state, kind
    return cache


@functools.cache
def _layer_of_numbers() -> Any:
    from transformers.cache_utils import StaticLayer

    class Layer(StaticLayer):  # type: ignore[misc]
        """Keys and values at the places of the step that runs."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            places = self.state.now
            assert places is not None  # a step has begun
            self.keys.index_copy_(2, places.index, key_states)
            self.values.index_copy_(2, places.index, value_states)
            return self.keys, self.values

        def filled(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
            """Return copies of the first keys and values."""
            return self.keys[:, :, :tokens].clone(), self.values[:, :, :tokens].clone()

    return Layer


@functools.cache
def _layer_of_codes() -> Any:
    from transformers.cache_utils import StaticLayer

    class Layer(StaticLayer):  # type: ignore[misc]
        """As codes. Attention that reads no codes gets the numbers of all places."""

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys = _no_codes(key_states, self.max_cache_len, self.kind)
            self.values = _no_codes(value_states, self.max_cache_len, self.kind)
            self.is_initialized = True

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            places = self.state.now
            assert places is not None  # a step has begun
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                written = codes_of(new, self.kind)
                kept.codes.index_copy_(2, places.index, written.codes)
                kept.scales.index_copy_(2, places.index, written.scales)
            if self.state.reads_codes and key_states.shape[2] == 1:
                return self.keys, self.values
            return self.keys.numbers(self.dtype), self.values.numbers(self.dtype)

        def filled(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
            """Return the first keys and values as numbers."""
            keys, values = (
                Codes(kept.codes[:, :, :tokens], kept.scales[:, :, :tokens], kept.kind)
                for kept in (self.keys, self.values)
            )
            return keys.numbers(self.dtype), values.numbers(self.dtype)

    return Layer


def _no_codes(numbers: torch.Tensor, length: int, kind: KvCache) -> Codes:
    """Return codes of zeros for `length` places, of heads as in numbers."""
    (batch, heads, _, width), place = numbers.shape, numbers.device
    codes = torch.zeros(batch, heads, length, width, dtype=torch.int8, device=place)
    scales = torch.zeros(batch, heads, length, dtype=torch.float32, device=place)
    if not torch.compiler.is_dynamo_compiling():
        for tensor in (codes, scales):  # as transformers' own: a graph is replayed over them
            torch._dynamo.mark_static_address(tensor)
    return Codes(codes, scales, kind)


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
