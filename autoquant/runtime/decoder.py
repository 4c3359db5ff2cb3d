"""The steps of a causal language model over a static cache: chunks of a prompt, and single tokens.

Each kind of step has fixed shapes, so that it is compiled once and, on a GPU, replayed as one CUDA graph. A prompt of any
length is cut into chunks of a few sizes. The last chunk is filled up with tokens whose keys and values later tokens
overwrite: the causal mask hides them until then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autoquant.errors import first_line
from autoquant.profiler.caches import kernels_kept, use_kernel_caches
from autoquant.profiler.compiled import Division, GraphedStep, compile_forward, ready_to_compile, repeated_blocks
from autoquant.profiler.device import compile_failure
from autoquant.profiler.parts import compile_parts, told_that_it_is_compiled

CHUNKS = (1024, 256, 64)
"""Tokens of a sequence in one step, for prompts."""
_MOST_ROWS = 16384
_SHORTEST_CACHE = 256
_FILL_FROM = 0.75

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cache_positions(tokens: int) -> int:
    """Return the length of the cache that holds `tokens`: one of two lengths an octave, so that few are compiled for."""
    length = _SHORTEST_CACHE
    while length < tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length // 3 * 4
    return length


def chunks_of(tokens: int, batch: int) -> list[int]:
    """Return the chunks that a prompt is cut into; the last one may be longer than what is left of the prompt."""
    sizes = [size for size in CHUNKS if size * batch <= _MOST_ROWS] or [CHUNKS[-1]]
    chunks = []
    left = tokens
    while left > 0:
        size = next((size for size in reversed(sizes) if size * _FILL_FROM <= left <= size), None)
        size = size or next((size for size in sizes if size <= left), sizes[-1])
        chunks.append(size)
        left -= size
    return chunks


class Decoder:
    """Runs a model over one static cache.

    Args:
        model: A causal language model of transformers, prepared.
        batch: Sequences.
        positions: Length of the cache.
        padded: Sequences may begin with padding, which a mask hides.

    Attributes:
        note: How steps are compiled where that is not as usual, and why.
    """

    def __init__(self, model: nn.Module, batch: int, positions: int, *, padded: bool) -> None:
        self.batch, self.positions, self.padded = batch, positions, padded
        self.note = ""
        self._model = model
        self._device = next(model.parameters()).device
        with torch.inference_mode(False), torch.no_grad():
            self._cache = _static_cache(model, positions)
            self._mask = torch.ones(batch, positions, dtype=torch.long, device=self._device) if padded else None
            self._first = torch.zeros(batch, 1, dtype=torch.long, device=self._device)
            self._keep = torch.zeros(1, dtype=torch.long, device=self._device)
            self._step_of(model)(self._first, self._first, self._keep)  # makes the cache's tensors
        self._steps: dict[int, Step] = {}
        self._in_parts: Step | None = None
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._position = self._first

    def start(self, mask: torch.Tensor | None) -> None:
        """Forget all tokens.

        Args:
            mask: `[batch, tokens]`, 0 for the prompt's padding; only for a padded decoder.
        """
        for length in self._lengths():
            length.zero_()
        if self._mask is not None:
            self._mask.fill_(1)
            if mask is not None:
                self._mask[:, : mask.shape[1]] = mask

    def prompt(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Take a prompt in.

        Args:
            ids: `[batch, tokens]`; so `positions`.

        Returns:
            Logits `[batch, vocabulary]` after its last token, valid until the next step.
        """
        start, logits = 0, torch.empty(0)
        for size in chunks_of(ids.shape[1], self.batch):
            taken = min(size, ids.shape[1] - start)
            part, places = ids[:, start : start + taken], positions[:, start : start + taken]
            logits = self._run(_filled(part, size), _filled(places, size), taken)
            start += taken
            if taken < size:
                for length in self._lengths():
                    length.sub_(size - taken)
        self._position = positions[:, -1:] + 1
        return logits

    def token(self, ids: torch.Tensor) -> torch.Tensor:
        """Take one token of each sequence in, `[batch, 1]`; as `prompt`."""
        logits = self._run(ids, self._position, 1)
        self._position = self._position + 1
        return logits

    def filled_cache(self, tokens: int) -> Any:
        """Return the keys and values of the first `tokens` positions, as transformers hands them out."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        for number, layer in enumerate(self._cache.layers):
            keys, values = (kept[:, :, :tokens].clone() for kept in (layer.keys, layer.values))
            cache.update(keys, values, number)
        return cache

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, taken: int) -> torch.Tensor:
        size = ids.shape[1]
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = self._make(size)
        keep = self._keep if taken == 1 else torch.full_like(self._keep, taken - 1)
        return step(ids, positions, keep)[:, -1]

    def _lengths(self) -> list[torch.Tensor]:
        return [layer.cumulative_length for layer in self._cache.layers]

    def _step_of(self, module: nn.Module) -> Step:
        keeps = bool(self._model._supports_logits_to_keep())  # type: ignore[operator]

        def step(ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            output = module(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self._mask,
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
                **({"logits_to_keep": keep} if keeps else {}),
            )
            logits: torch.Tensor = output.logits
            return logits if keeps else logits.index_select(1, keep)

        return step

    def _make(self, size: int) -> Step:
        """Return the step for chunks of `size` tokens, by the first way of compiling that works."""
        reason = ""
        for division in _divisions(self._model, self._device):
            try:
                step = self._compiled(division)
                self._try(step, size)
            except Exception as error:  # noqa: BLE001 - what one way of compiling fails on another may take
                reason = reason or f"compiling in {division} failed: {first_line(error, with_type=True)}"
                continue
            self.note = reason and f"steps are compiled in another way, since {reason}"
            return step
        reason = reason or f"torch.compile does not work here: {compile_failure()}"
        self.note = f"steps run without being compiled, since {reason}"
        return self._step_of(self._model)

    def _compiled(self, division: Division) -> Step:
        use_kernel_caches()
        if division == "parts":
            if self._in_parts is None:
                ready = compile_parts(ready_to_compile(self._model, regions=False))
                self._in_parts = told_that_it_is_compiled()(self._step_of(ready))
            step = self._in_parts
        else:
            ready = ready_to_compile(self._model, regions=division == "regions")
            step = compile_forward(self._step_of(ready))
        if self._device.type == "cuda":
            return GraphedStep(step, self._lengths, self._pool)
        return step

    def _try(self, step: Step, size: int) -> None:
        """Run a step, which compiles it, and leave the cache as it was where that matters.

        Keys and values are written behind those that are there, and overwritten later.
        """
        before = [length.clone() for length in self._lengths()]
        ids = torch.zeros(self.batch, size, dtype=torch.long, device=self._device)
        room = self.positions - size
        for length in self._lengths():
            length.clamp_(max=room)
        try:
            with kernels_kept(str(self._device)):
                step(ids, ids, self._keep)
        finally:
            for length, value in zip(self._lengths(), before, strict=True):
                length.copy_(value)


def _divisions(model: nn.Module, device: torch.device) -> tuple[Division, ...]:
    """Return the ways to compile steps, in the order in which to try them."""
    if device.type == "cpu" and compile_failure() is not None:
        return ()
    blocks = any(True for _ in repeated_blocks(model))
    return ("parts", "regions", "whole") if blocks else ("whole",)


def _static_cache(model: nn.Module, positions: int) -> Any:
    """Return a cache all of whose layers hold every position: windows are left to the mask.

    Raises:
        TypeError: The model keeps something else than keys and values.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config, max_cache_len=positions)
    kinds = {type(layer) for layer in cache.layers} - {StaticLayer, StaticSlidingWindowLayer}
    if kinds:
        raise TypeError(f"it keeps a {', '.join(sorted(kind.__name__ for kind in kinds))}")
    cache.layers = [StaticLayer(max_cache_len=positions) for _ in cache.layers]
    return cache


def _filled(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Return `[batch, tokens]` made `size` tokens long; what is added goes on as positions do."""
    missing = size - tensor.shape[1]
    if missing <= 0:
        return tensor
    return torch.cat((tensor, tensor[:, -1:].expand(-1, missing)), dim=1)
