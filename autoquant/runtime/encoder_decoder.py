"""The phases of a model with an encoder and a decoder.

A prefill reads the input as a whole, fills the cache of what the decoder looks up in it, and gives
the scores of the first token. A decode step gives those of one more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autoquant.devices import Division
from autoquant.records import Workload
from autoquant.runtime.compiled import compile_forward, ready_to_compile
from autoquant.runtime.decoder_phases import CompiledPrompt
from autoquant.runtime.inputs import start_ids

_Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_Encode = Callable[[], torch.Tensor]


class EncoderDecoderPhases:
    """Prefill and decode with static caches; see `autoquant.runtime.phases.Phases`.

    Args:
        inputs: What the encoder reads, on the device.
    """

    def __init__(
        self,
        module: nn.Module,
        workload: Workload,
        inputs: Mapping[str, Any],
        *,
        compiled: bool,
        division: Division,
    ) -> None:
        self.workload = workload
        self._inputs = dict(inputs)
        rows = len(next(iter(inputs.values())))
        device = str(next(iter(inputs.values())).device)
        self._steps = workload.new_tokens if "decode" in workload.calls() else 0
        self._ids = _decoder_ids(module, rows, self._steps, device)
        encode = _encoder_of(module, self._inputs)
        with torch.no_grad():
            self._cache = _caches(module, 1 + self._steps, encode().shape[1])
        self._eager = (encode, _step_of(module, self._cache, self._inputs))
        self._first = self._later = self._eager
        self._prefill("eager")  # makes the caches' tensors, so that compiled code finds them ready
        if compiled:
            ready = ready_to_compile(module, regions=division != "whole")
            encode = compile_forward(_encoder_of(ready, self._inputs))
            self._first = (encode, compile_forward(_step_of(ready, self._cache, self._inputs)))
            self._later = (encode, compile_forward(_step_of(ready, self._cache, self._inputs)))

    def reset(self, phase: str) -> None:
        self._cache.reset()
        self._position = 0
        if phase == "decode":
            self._prefill("eager")

    def limit(self, phase: str) -> int:
        return self._steps if phase == "decode" else 1

    def run(self, phase: str) -> torch.Tensor:
        return self._step("compiled") if phase == "decode" else self._prefill("compiled")

    def run_eager(self, phase: str) -> torch.Tensor:
        return self._step("eager") if phase == "decode" else self._prefill("eager")

    def run_launched(self, phase: str) -> torch.Tensor:
        return self.run(phase)

    def compiled_prompt(self) -> CompiledPrompt | None:
        return None

    def _prefill(self, way: str) -> torch.Tensor:
        encode, step = self._eager if way == "eager" else self._first
        self._position = 1
        with torch.no_grad():
            self._hidden = encode()
            return step(self._hidden, self._ids[:, :1])

    def _step(self, way: str) -> torch.Tensor:
        _, step = self._eager if way == "eager" else self._later
        start = self._position
        self._position += 1
        with torch.no_grad():
            return step(self._hidden, self._ids[:, start : start + 1].clone())


def _decoder_ids(module: nn.Module, rows: int, steps: int, device: str) -> torch.Tensor:
    """Return what the decoder reads `[rows, 1 + steps]`: the start, then random ids."""
    config: Any = module.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, steps), generator=generator).to(device)
    return torch.cat([start_ids(module, rows, device), ids], dim=1)


def _caches(module: nn.Module, decoder_tokens: int, encoder_positions: int) -> Any:
    from transformers import EncoderDecoderCache, StaticCache

    config: Any = module.config
    decoder = config.get_text_config(decoder=True)
    return EncoderDecoderCache(
        StaticCache(config=decoder, max_cache_len=decoder_tokens),
        StaticCache(config=decoder, max_cache_len=encoder_positions),
    )


def _encoder_of(module: nn.Module, inputs: Mapping[str, Any]) -> _Encode:
    model: Any = module
    encoder = model.get_encoder()

    def encode() -> torch.Tensor:
        hidden: torch.Tensor = encoder(**inputs)[0]
        return hidden

    return encode


def _step_of(module: nn.Module, cache: Any, inputs: Mapping[str, Any]) -> _Step:
    """Return a step that gives the logits of the next token."""
    from transformers.modeling_outputs import BaseModelOutput

    masks = {name: inputs[name] for name in ("attention_mask",) if name in inputs}

    def forward(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        output = module(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            **masks,
        )
        logits: torch.Tensor = output.logits
        return logits

    return forward
