"""Run the phases of a workload: a prefill, a decode step, or one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import nn

from autoquant.devices import Division, backend
from autoquant.errors import WorkloadError
from autoquant.models import LoadedModel
from autoquant.models.outputs import output_tensor
from autoquant.records import Workload
from autoquant.runtime.compiled import compile_forward, ready_to_compile, repeated_blocks
from autoquant.runtime.decoder_phases import CompiledPrompt, DecoderPhases
from autoquant.runtime.encoder_decoder import EncoderDecoderPhases
from autoquant.runtime.generate.kv_codes import kv_cache_of
from autoquant.runtime.inputs import check_reads, workload_inputs
from autoquant.runtime.tokens import WorkloadTokens

_Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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
        division: What is compiled as one. `parts` needs a model with repeated blocks that keeps
            keys and values; other models are then compiled by `regions`.

    Raises:
        WorkloadError: The workload does not fit the model.
    """
    check_workload(loaded, workload)
    if loaded.kind == "causal_lm":
        if compiled and division == "parts" and any(repeated_blocks(loaded.module)):
            with suppress(TypeError):
                return DecoderPhases(loaded.module, workload, loaded.device)
        if kv_cache_of(loaded.module) is not None:  # only steps of `generate` keep codes
            divisions: tuple[Division, ...] = (division,) if compiled else ()
            return DecoderPhases(loaded.module, workload, loaded.device, divisions)
        return _CausalPhases(loaded.module, workload, loaded.device, compiled, division)
    if loaded.kind == "token_lm":
        shape = (workload.batch, workload.phases[0].tokens)
        # Different tokens, as in a text: alike ones would all go to the same experts.
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(loaded.vocabulary or 1, shape, generator=generator).to(loaded.device)
        return _ForwardPhases(loaded.module, workload, (ids,), compiled, division)
    inputs = workload_inputs(loaded, workload)
    assert inputs is not None  # check_workload saw to it
    if loaded.kind == "encoder_decoder":
        assert isinstance(inputs, dict)  # its reader names them
        return EncoderDecoderPhases(
            loaded.module, workload, inputs, compiled=compiled, division=division
        )
    return _ForwardPhases(loaded.module, workload, inputs, compiled, division)


def check_workload(loaded: LoadedModel, workload: Workload) -> None:
    """Refuse a workload that does not fit the model.

    Raises:
        WorkloadError: The sequence is too long, the model cannot decode, or inputs are missing.
    """
    tokens, most = _tokens(workload), loaded.max_positions
    if loaded.reader is not None:
        check_reads(loaded, workload)
        tokens = workload.prompt_tokens
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


def check_room(loaded: LoadedModel, workload: Workload) -> None:
    """Refuse a request whose token ids and scores alone take more memory than there is.

    Raises:
        WorkloadError: They do. What fits here may still need more when it runs.
    """
    room_bytes = backend(loaded.device).room_bytes()
    if room_bytes is None or loaded.kind in ("module", "encoder_decoder"):
        return
    scored = 1 if loaded.kind == "causal_lm" else workload.prompt_tokens
    scores = scored * (loaded.vocabulary or 1) * getattr(torch, loaded.dtype).itemsize
    if workload.batch * (_tokens(workload) * torch.int64.itemsize + scores) > room_bytes:
        raise no_room(workload, loaded.device)


def no_room(workload: Workload, device: str) -> WorkloadError:
    """Make the error for a request that takes more memory than a device has."""
    return WorkloadError(
        f"a request of {workload} does not fit into the memory of {device}: lower --batch, or ask"
        " for fewer tokens with --workload"
    )


def _tokens(workload: Workload) -> int:
    """Count the positions of one sequence."""
    tokens = sum(p.tokens * (1 if p.name == "prefill" else p.calls) for p in workload.phases)
    if all(phase.name == "decode" for phase in workload.phases):
        tokens += 1  # decoding alone starts behind a prompt of one token
    return tokens


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
        tokens = WorkloadTokens(module, workload, device)
        self._prompt, self._steps, self._ids = tokens.prompt, tokens.steps, tokens.ids
        self._position = 0

        self._cache = StaticCache(config=module.config, max_cache_len=self._prompt + self._steps)
        self._eager = self._launched = self._forward = _step_of(module, self._cache)
        # Makes the cache's tensors, so that compiled code finds them ready.
        self._step(self._eager, 1)
        if compiled:
            ready = ready_to_compile(module, regions=division != "whole")
            self._forward = self._launched = compile_forward(_step_of(ready, self._cache))
            # A sliding cache branches on how far it is filled, and so may one that keeps a state. A
            # graph has one branch.
            steady = not any(getattr(layer, "is_sliding", True) for layer in self._cache.layers)
            if steady and backend(device).graphs:
                self._forward = backend(device).graphed(self._launched, self._lengths)

    def reset(self, phase: str) -> None:
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
        return None

    def _tokens(self, phase: str) -> int:
        return 1 if phase == "decode" else self._prompt

    def _step(self, forward: Callable[..., torch.Tensor], tokens: int) -> torch.Tensor:
        start, end = self._position, self._position + tokens
        self._position = end
        positions = torch.arange(start, end, device=self._device).unsqueeze(0)
        with torch.no_grad():
            return forward(self._ids[:, start:end], positions)

    def _lengths(self) -> list[torch.Tensor]:
        """Return what a step advances: how far each layer's cache is filled."""
        return [layer.cumulative_length for layer in self._cache.layers]


def _pass_of(module: nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return forward


def _step_of(module: nn.Module, cache: Any) -> _Step:
    """Return a step that gives the logits of the last token."""

    def forward(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = module(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits
        return logits

    return forward
