"""The phases of a causal language model, by the steps that `generate` replays.

So what a search proves is what its user runs, and what is compiled for one is there for the other.
Only a prompt differs: here it is one chunk of its own length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from autoquant.devices import Division
from autoquant.records import Workload
from autoquant.runtime.generate.decoder import Decoder, Way, cache_positions
from autoquant.runtime.generate.kv_codes import kv_cache_of
from autoquant.runtime.tokens import WorkloadTokens


class CompiledPrompt(nn.Module):
    """Maps token ids `[1, tokens]` to logits `[1, tokens, vocabulary]`.

    Attributes:
        tokens: It takes windows of that length only: its parts are compiled for them.
    """

    def __init__(self, phases: DecoderPhases, tokens: int) -> None:
        super().__init__()
        self.tokens, self._phases = tokens, phases

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._phases.all_logits(ids)


class DecoderPhases:
    """Prefill and decode, compiled part by part; see `autoquant.runtime.phases.Phases`.

    Args:
        divisions: Ways to compile, in the order in which to try them; none for the model's own
            code.

    Raises:
        TypeError: The model keeps something else than keys and values.
    """

    def __init__(
        self,
        module: nn.Module,
        workload: Workload,
        device: str,
        divisions: Sequence[Division] = ("parts",),
    ) -> None:
        self.workload = workload
        self._tokens = WorkloadTokens(module, workload, device)
        length = cache_positions(self._tokens.prompt + self._tokens.steps)
        self._decoder = Decoder(
            module,
            workload.batch,
            length,
            padded=False,
            kv_cache=kv_cache_of(module),
            divisions=divisions,
        )
        self._positions = torch.arange(self._tokens.prompt, device=device).expand(
            workload.batch, -1
        )
        self._position = 0

    def reset(self, phase: str) -> None:
        """Get ready for calls of a phase. A prompt that is in the cache serves for many steps."""
        if phase == "decode" and self._position >= self._tokens.prompt:
            self._decoder.rewind(self._tokens.prompt)
            self._position = self._tokens.prompt
            return
        self._decoder.start(None)
        self._position = 0
        if phase == "decode":
            self._run("prefill", "eager")

    def limit(self, phase: str) -> int:
        return self._tokens.steps if phase == "decode" else 1

    def run(self, phase: str) -> torch.Tensor:
        return self._run(phase, "replayed")

    def run_eager(self, phase: str) -> torch.Tensor:
        return self._run(phase, "eager")

    def run_launched(self, phase: str) -> torch.Tensor:
        return self._run(phase, "launched")

    def compiled_prompt(self) -> CompiledPrompt | None:
        if self.workload.batch > 1:
            return None
        return CompiledPrompt(self, self._tokens.prompt)

    def all_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits `[1, tokens, vocabulary]` of another prompt `[1, tokens]`."""
        self._decoder.start(None)
        self._position = self._tokens.prompt
        with torch.no_grad():
            return self._decoder.all_logits(_compact(ids), self._positions)

    def _run(self, phase: str, way: Way) -> torch.Tensor:
        tokens = 1 if phase == "decode" else self._tokens.prompt
        start, end = self._position, self._position + tokens
        self._position = end
        ids = _compact(self._tokens.ids[:, start:end])
        with torch.no_grad():
            if phase == "decode":
                logits = self._decoder.token(ids, way)
            else:
                logits = self._decoder.chunk(ids, self._positions, way)
        return logits.unsqueeze(1)


def _compact(ids: torch.Tensor) -> torch.Tensor:
    """Return ids with the strides that all of their shape have: parts are compiled for those."""
    return ids.clone(memory_format=torch.contiguous_format)
