"""Run the phases of a workload: a prefill, a decode step, or one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from autoquant.devices import Division, backend
from autoquant.errors import WorkloadError
from autoquant.models import LoadedModel
from autoquant.models.outputs import output_tensor
from autoquant.records import Workload
from autoquant.runtime.compiled import compile_forward, ready_to_compile, repeated_blocks
from autoquant.runtime.parts import as_if_compiled, compile_parts

_Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DEFAULT_LM_WORKLOAD = "prefill=512,decode=128"
DEFAULT_TOKEN_WORKLOAD = "prefill=512"


class Phases(Protocol):
    """Runs a model for each phase of a workload.

    Methods:
        reset: Get ready for calls of a phase. A decode step needs a filled cache.
        run: Make one call of the phase, compiled if the phases were made so. At most
            `limit(phase)` calls may follow a reset.
        run_eager: As `run`, but never compiled.
        run_launched: As `run`, but without a CUDA graph: each kernel is launched by itself.
        compiled_prompt: Return what gives the logits of whole windows by the compiled prefill, or
            None if there is none that can.
    """

    workload: Workload

    def reset(self, phase: str) -> None: ...

    def run(self, phase: str) -> torch.Tensor: ...

    def run_eager(self, phase: str) -> torch.Tensor: ...

    def run_launched(self, phase: str) -> torch.Tensor: ...

    def limit(self, phase: str) -> int: ...

    def compiled_prompt(self) -> CompiledPrompt | None: ...


class CompiledPrompt(nn.Module):
    """Maps token ids `[1, tokens]` to logits `[1, tokens, vocabulary]`.

    Attributes:
        tokens: It takes windows of that length only: its parts are compiled for them.
    """

    def __init__(self, tokens: int, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.tokens, self._run = tokens, run

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._run(ids)


def make_phases(
    loaded: LoadedModel,
    workload: Workload,
    *,
    compiled: bool = False,
    division: Division = "parts",
) -> Phases:
    """Choose how to run a model for a workload.

    Args:
        compiled: Compile the forward pass, each phase with static shapes. On CUDA also capture it
            as a CUDA graph.
        division: What is compiled as one. `parts` needs a model with repeated blocks and a cache
            without a sliding window; other models are then compiled by `regions`.

    Raises:
        WorkloadError: The workload does not fit the model.
    """
    check_workload(loaded, workload)
    if loaded.kind == "causal_lm":
        return _CausalPhases(loaded.module, workload, loaded.device, compiled, division)
    if loaded.kind == "token_lm":
        shape = (workload.batch, workload.phases[0].tokens)
        # Different tokens, as in a text: alike ones would all go to the same experts.
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(loaded.vocabulary or 1, shape, generator=generator).to(loaded.device)
        return _ForwardPhases(loaded.module, workload, (ids,), compiled, division)
    inputs = loaded.example_inputs
    assert inputs is not None  # check_workload saw to it
    return _ForwardPhases(loaded.module, workload, inputs, compiled, division)


def check_workload(loaded: LoadedModel, workload: Workload) -> None:
    """Refuse a workload that does not fit the model.

    Raises:
        WorkloadError: The sequence is too long, the model cannot decode, or inputs are missing.
    """
    tokens, most = _tokens(workload), loaded.max_positions
    if most is not None and tokens > most:
        raise WorkloadError(
            f"the workload needs {tokens} positions, the model has {most}: ask for fewer tokens"
        )
    decodes = any(phase.name == "decode" for phase in workload.phases)
    if loaded.kind == "token_lm" and decodes:
        raise WorkloadError(
            "this model keeps no cache, so it has no decode phase: use --workload prefill=TOKENS"
        )
    if loaded.kind == "module" and loaded.example_inputs is None:
        raise WorkloadError(
            "this model needs sample inputs: give autoquant search --sample-inputs"
            " package.module:callable, or call it from Python with sample_inputs=...; a model that"
            " takes token ids needs --tokenizer FOLDER instead"
        )


def _tokens(workload: Workload) -> int:
    """Count the positions of one sequence."""
    tokens = sum(p.tokens * (1 if p.name == "prefill" else p.calls) for p in workload.phases)
    if all(phase.name == "decode" for phase in workload.phases):
        tokens += 1  # decoding alone starts behind a prompt of one token
    return tokens


def default_workload(kind: str, batch: int) -> Workload:
    """Return the default workload of a model of `kind` (see `LoadedModel`)."""
    if kind == "causal_lm":
        return Workload.parse(DEFAULT_LM_WORKLOAD, batch)
    if kind == "token_lm":
        return Workload.parse(DEFAULT_TOKEN_WORKLOAD, batch)
    return Workload.single()


class _ForwardPhases:
    """One forward pass with fixed inputs."""

    def __init__(
        self,
        module: nn.Module,
        workload: Workload,
        inputs: Sequence[Any] | Mapping[str, Any],
        compiled: bool,
        division: Division,
    ) -> None:
        self.workload = workload
        self._args = () if isinstance(inputs, Mapping) else tuple(inputs)
        self._kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        self._eager = self._forward = _pass_of(module)
        if compiled:
            self._forward = compile_forward(
                _pass_of(ready_to_compile(module, regions=division != "whole"))
            )

    def reset(self, phase: str) -> None:
        pass

    def limit(self, phase: str) -> int:
        return 1 << 30

    def run(self, phase: str) -> torch.Tensor:
        with torch.no_grad():
            return output_tensor(self._forward(*self._args, **self._kwargs))

    def run_eager(self, phase: str) -> torch.Tensor:
        with torch.no_grad():
            return output_tensor(self._eager(*self._args, **self._kwargs))

    def run_launched(self, phase: str) -> torch.Tensor:
        return self.run(phase)

    def compiled_prompt(self) -> CompiledPrompt | None:
        return None


class _CausalPhases:
    """Prefill and decode of a Hugging Face causal language model with a static cache."""

    def __init__(
        self, module: nn.Module, workload: Workload, device: str, compiled: bool, division: Division
    ) -> None:
        from transformers import StaticCache

        self.workload = workload
        self._device = device
        phases = {phase.name: phase for phase in workload.phases}
        self._prompt = phases["prefill"].tokens if "prefill" in phases else 1
        self._steps = phases["decode"].calls if "decode" in phases else 0
        config: Any = module.config
        generator = torch.Generator().manual_seed(0)
        vocabulary = config.get_text_config(decoder=True).vocab_size
        shape = (workload.batch, self._prompt + self._steps)
        self._ids = torch.randint(0, vocabulary, shape, generator=generator).to(device)
        self._position = 0

        self._cache = StaticCache(config=config, max_cache_len=self._prompt + self._steps)
        self._eager = self._launched = self._forward = _step_of(module, self._cache)
        # Makes the cache's tensors, so that compiled code finds them ready.
        self._step(self._eager, 1)
        self._in_parts: nn.Module | None = None
        # A sliding cache branches on how far it is filled. What is traced, or replayed as a graph,
        # has one branch.
        self._steady = not any(layer.is_sliding for layer in self._cache.layers)
        self._rewinds = self._steady and all(
            hasattr(layer, "cumulative_length") for layer in self._cache.layers
        )
        if compiled:
            self._compile(module, division)

    def _compile(self, module: nn.Module, division: Division) -> None:
        if self._steady and division == "parts" and any(repeated_blocks(module)):
            self._in_parts = compile_parts(ready_to_compile(module, regions=False))
            self._forward = as_if_compiled()(_step_of(self._in_parts, self._cache))
        else:
            ready = ready_to_compile(module, regions=division != "whole")
            self._forward = compile_forward(_step_of(ready, self._cache))
        self._launched = self._forward
        if self._steady and backend(self._device).graphs:
            self._forward = backend(self._device).graphed(self._launched, self._lengths)

    def reset(self, phase: str) -> None:
        if phase == "decode" and self._rewinds and self._position >= self._prompt:
            # A prompt is in the cache. Steps write over what steps wrote before.
            for length in self._lengths():
                length.fill_(self._prompt)
            self._position = self._prompt
            return
        self._cache.reset()
        self._position = 0
        if phase == "decode":
            # Steps are timed behind a full prompt; filling the cache is no part of their time.
            self._step(self._eager, self._prompt)

    def limit(self, phase: str) -> int:
        return self._steps if phase == "decode" else 1

    def run(self, phase: str) -> torch.Tensor:
        return self._step(self._forward, self._tokens(phase))

    def run_eager(self, phase: str) -> torch.Tensor:
        return self._step(self._eager, self._tokens(phase))

    def run_launched(self, phase: str) -> torch.Tensor:
        return self._step(self._launched, self._tokens(phase))

    def compiled_prompt(self) -> CompiledPrompt | None:
        if self._in_parts is None or self.workload.batch > 1:
            return None
        whole = as_if_compiled()(_step_of(self._in_parts, self._cache, keep=0))
        given = torch.zeros_like(self._ids)  # with the strides that parts were compiled for

        def run(ids: torch.Tensor) -> torch.Tensor:
            self.reset("prefill")
            given[:, : self._prompt] = ids
            return self._step(whole, self._prompt, given)

        return CompiledPrompt(self._prompt, run)

    def _tokens(self, phase: str) -> int:
        return 1 if phase == "decode" else self._prompt

    def _step(
        self,
        forward: Callable[..., torch.Tensor],
        tokens: int,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the next tokens of `ids` (None: of the workload's)."""
        ids = self._ids if ids is None else ids
        start, end = self._position, self._position + tokens
        self._position = end
        positions = torch.arange(start, end, device=self._device).unsqueeze(0)
        with torch.no_grad():
            return forward(ids[:, start:end], positions)

    def _lengths(self) -> list[torch.Tensor]:
        """Return what a step advances: how far each layer's cache is filled."""
        return [layer.cumulative_length for layer in self._cache.layers]


def _pass_of(module: nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return forward


def _step_of(module: nn.Module, cache: Any, keep: int = 1) -> _Step:
    """Return a step that gives the logits of the last `keep` tokens; 0: of all."""

    def forward(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = module(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits
        return logits

    return forward
