"""The loop over the tokens of one call of `generate`, by the steps of a `Decoder`.

It does what transformers' `GenerationMixin._sample` does, in the same order: scores, logits
processors, choice of the next token, stopping criteria, streamer. Where it can, all of this is a
part of the step (see `autoquant.runtime.generate.choice`). On a GPU it runs ahead: results of a
step are copied to the host while the next steps run, and steps that turn out to be behind the end
are dropped.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autoquant.devices import backend
from autoquant.devices.base import Event
from autoquant.runtime.generate.choice import Choice, rule_of
from autoquant.runtime.generate.decoder import Decoder

_AHEAD = 2
"""Steps that are launched before the result of one is looked at, on a GPU."""


class Loop:
    """One call of `generate`.

    Args:
        decoder: Has room for the longest sequence.
        input_ids: The prompts, `[batch, tokens]`.
        model_inputs: `attention_mask` and `position_ids`, both `[batch, tokens]` or None.
    """

    def __init__(
        self,
        decoder: Decoder,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        synced_gpus: bool = False,
        **model_inputs: Any,
    ) -> None:
        from transformers.generation import MaxLengthCriteria

        self._decoder = decoder
        self._ids = input_ids
        self._processor = logits_processor
        self._limit: int = stopping_criteria.max_length
        # The host knows the length: asking a criterion for it would launch kernels in every step.
        self._criteria = [one for one in stopping_criteria if type(one) is not MaxLengthCriteria]
        self._config = generation_config
        self._streamer = streamer
        self._mask = model_inputs.get("attention_mask")
        self._positions = model_inputs.get("position_ids")
        self._unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self._pad = generation_config._pad_token_tensor.to(input_ids.device) if ends else None
        self._choice: Choice | None = None
        kept = generation_config.return_dict_in_generate
        self._reads_scores = bool(len(logits_processor) or generation_config.do_sample or kept)
        self._scores: list[torch.Tensor] | None = (
            [] if kept and generation_config.output_scores else None
        )
        self._logits: list[torch.Tensor] | None = (
            [] if kept and generation_config.output_logits else None
        )

    def run(self) -> Any:
        """Return what `_sample` returns."""
        prompt = self._ids.shape[1]
        # transformers makes one token even if the prompt is as long as the limit.
        most = max(self._limit - prompt, 1)
        seen = _Seen(self._ids, most, self._streamer)
        self._decoder.start(self._mask)
        logits = self._decoder.prompt(self._ids, self._prompt_positions())
        tokens = self._next(logits)
        seen.add(tokens, self._unfinished.max())
        advance = self._advance(tokens)
        steps = None
        while steps is None and seen.added < most:
            steps = seen.look(self._ahead)
            if steps is None:
                seen.add(*advance())
        steps = steps or seen.look(0) or most
        if self._streamer is not None:
            self._streamer.end()
        return self._result(prompt, steps)

    def _advance(self, tokens: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Return what makes a step: it returns the next tokens, and 1 if a sequence goes on.

        Args:
            tokens: The first ones, `[batch]`.
        """
        decoder = self._decoder
        kept = self._scores is not None or self._logits is not None
        prompt = self._ids.shape[1] - 1
        found = None if kept else rule_of(self._processor, self._criteria, self._config, prompt)
        if found is None:
            return self._step
        rule, earliest = found
        self._choice = decoder.choice
        decoder.choice.start(rule, tokens, self._unfinished, earliest)
        return lambda: (decoder.choose(rule)[:, 0], decoder.choice.going_on)

    def _step(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._next(self._decoder.token(self._ids[:, -1:])), self._unfinished.max()

    @functools.cached_property
    def _ahead(self) -> int:
        """How many steps to run ahead: none if a criterion of the user must see each first."""
        own = any(
            not type(criterion).__module__.startswith("transformers.")
            for criterion in self._criteria
        )
        return 0 if own or not backend(self._ids.device).graphs else _AHEAD

    def _prompt_positions(self) -> torch.Tensor:
        positions = self._positions
        if positions is None:
            positions = torch.arange(self._ids.shape[1], device=self._ids.device).unsqueeze(0)
            if self._mask is not None:
                # Padding has no position of its own: the first token after it has position 0.
                positions = (self._mask.long().cumsum(-1) - 1).clamp(min=0)
        return positions[:, -self._ids.shape[1] :].expand(self._ids.shape)

    def _next(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose the next tokens `[batch]` and note which sequences have ended."""
        # A copy, since the next step writes its logits to the same place.
        raw = logits.to(copy=True, dtype=torch.float32) if self._reads_scores else logits
        scores = self._processor(self._ids, raw)
        if self._scores is not None:
            self._scores.append(scores)
        if self._logits is not None:
            self._logits.append(raw)
        if self._config.do_sample:
            tokens = torch.multinomial(
                nn.functional.softmax(scores, dim=-1), num_samples=1
            ).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self._pad is not None:
            tokens = tokens * self._unfinished + self._pad * (1 - self._unfinished)
        self._ids = torch.cat((self._ids, tokens[:, None]), dim=-1)
        so_far = None if self._scores is None else tuple(self._scores)
        for criterion in self._criteria:
            self._unfinished = self._unfinished & ~criterion(self._ids, so_far)
        return tokens

    def _result(self, prompt: int, steps: int) -> Any:
        from transformers.generation import GenerateDecoderOnlyOutput

        made = self._ids[:, prompt:] if self._choice is None else self._choice.made
        sequences = torch.cat((self._ids[:, :prompt], made[:, :steps]), dim=-1)
        if not self._config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if self._scores is None else tuple(self._scores[:steps]),
            logits=None if self._logits is None else tuple(self._logits[:steps]),
            past_key_values=self._decoder.filled_cache(prompt + steps - 1),
        )


class _Seen:
    """The results of steps that the host has seen.

    Args:
        steps: The most steps to run.

    Attributes:
        added: How many steps have been launched.
    """

    def __init__(self, ids: torch.Tensor, steps: int, streamer: Any) -> None:
        self._device = backend(ids.device)
        pinned = self._device.graphs
        self._going_on = torch.ones(steps, dtype=torch.long, pin_memory=pinned)
        self._tokens = torch.zeros(steps, len(ids), dtype=torch.long, pin_memory=pinned)
        self._streamer = streamer
        self._events: deque[Event] = deque()
        self.added = self._looked_at = 0

    def add(self, tokens: torch.Tensor, going_on: torch.Tensor) -> None:
        """Have a step's result copied to the host: its tokens, and 1 if a sequence goes on."""
        self._going_on[self.added].copy_(going_on, non_blocking=True)
        if self._streamer is not None:
            self._tokens[self.added].copy_(tokens, non_blocking=True)
        if (event := self._device.event()) is not None:
            self._events.append(event)
        self.added += 1

    def look(self, ahead: int) -> int | None:
        """Return after how many steps all sequences had ended, or None if they have not.

        Args:
            ahead: How many of the last steps not to wait for.
        """
        while self.added - self._looked_at > ahead:
            step = self._looked_at
            if self._events:
                self._events.popleft().synchronize()
            if self._streamer is not None:
                self._streamer.put(self._tokens[step].clone())
            self._looked_at += 1
            if not self._going_on[step]:
                return self._looked_at
        return None
