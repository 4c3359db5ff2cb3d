"""What a model reads in a request of a workload, and the workloads that fit what it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autoquant.errors import WorkloadError
from autoquant.models import LoadedModel
from autoquant.models.reader import on
from autoquant.records import Workload

DEFAULT_LM_WORKLOAD = "prefill=512,decode=128"
DEFAULT_TOKEN_WORKLOAD = "prefill=512"
_PROMPT_TOKENS, _NEW_TOKENS = 512, 128


def default_workload(loaded: LoadedModel, batch: int) -> Workload:
    """Return the default workload of a model, as far as it can go."""
    if loaded.kind == "causal_lm":
        return Workload.parse(DEFAULT_LM_WORKLOAD, batch)
    if loaded.kind == "token_lm":
        return Workload.parse(DEFAULT_TOKEN_WORKLOAD, batch)
    if loaded.reader is None:
        return Workload.single()
    prompt = _read_positions(loaded) or min(_PROMPT_TOKENS, loaded.max_positions or _PROMPT_TOKENS)
    if loaded.kind == "encoder_decoder":
        steps = min(_NEW_TOKENS, (_most_new_tokens(loaded) or _NEW_TOKENS))
        return Workload.parse(f"prefill={prompt},decode={steps}", batch)
    if "texts" in loaded.reader.reads:
        return Workload.parse(f"prefill={prompt}", batch)
    return Workload(phases=Workload.single().phases, batch=batch)


def check_reads(loaded: LoadedModel, workload: Workload) -> None:
    """Refuse a workload that does not fit what a model with a reader reads.

    Raises:
        WorkloadError: It has a phase that the model does not have, or inputs of another length.
    """
    assert loaded.reader is not None
    names = [phase.name for phase in workload.phases]
    if loaded.kind == "encoder_decoder":
        _check_encoder_decoder(loaded, workload)
        return
    name = loaded.family.name if loaded.family else "model"
    if "decode" in names:
        raise WorkloadError(
            f"a {name} generates nothing, so it has no decode phase: use"
            f" {'--workload prefill=TOKENS' if _by_tokens(loaded) else '--batch NUMBER alone'}"
        )
    if not _by_tokens(loaded) and names != ["forward"]:
        kind = loaded.reader.reads[0]
        raise WorkloadError(
            f"this {name} reads {kind}, all of one size: leave out --workload, and say with --batch"
            f" how many {kind} a request has"
        )


def _check_encoder_decoder(loaded: LoadedModel, workload: Workload) -> None:
    if "prefill" not in [phase.name for phase in workload.phases]:
        raise WorkloadError(
            "a model with an encoder reads its input first: use --workload"
            " prefill=TOKENS,decode=STEPS"
        )
    fixed, most = _read_positions(loaded), _most_new_tokens(loaded)
    if fixed is not None and workload.prompt_tokens != fixed:
        raise WorkloadError(
            f"every sound fills the {fixed} positions of this model's encoder: use --workload"
            f" prefill={fixed},decode=STEPS"
        )
    if most is not None and workload.new_tokens > most:
        raise WorkloadError(
            f"the workload generates {workload.new_tokens} tokens, the model's decoder has {most}"
            " positions: ask for fewer"
        )


def workload_inputs(
    loaded: LoadedModel, workload: Workload
) -> tuple[Any, ...] | dict[str, Any] | None:
    """Return the arguments of a forward pass of a workload, on the model's device.

    Of a model with a reader they are made up, as many rows as the workload has. Of another module
    they are its example inputs.
    """
    if loaded.reader is None:
        return loaded.example_inputs
    made: Mapping[str, Any] = loaded.reader.made_up(0, workload.batch, workload.prompt_tokens)
    return on(made, loaded.device)


def start_ids(module: Any, rows: int, device: str) -> torch.Tensor:
    """Return the ids `[rows, 1]` that the decoder of a model starts from."""
    for place in (getattr(module, "generation_config", None), module.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            found = getattr(place, name, None)
            if isinstance(found, int):
                return torch.full((rows, 1), found, device=device)
    return torch.zeros((rows, 1), dtype=torch.long, device=device)


def _by_tokens(loaded: LoadedModel) -> bool:
    return loaded.reader is not None and "texts" in loaded.reader.reads


def _read_positions(loaded: LoadedModel) -> int | None:
    """Return how many positions every input of a model has that reads no text, or None."""
    if loaded.kind != "encoder_decoder" or _by_tokens(loaded):
        return None
    config: Any = loaded.module.config
    found = getattr(config, "max_source_positions", None)
    return found if isinstance(found, int) and found > 0 else 1


def _most_new_tokens(loaded: LoadedModel) -> int | None:
    config: Any = loaded.module.config
    if "T5" in type(config).__name__:  # relative positions go on and on
        return None
    text = config.get_text_config(decoder=True)
    names: Sequence[str] = ("max_target_positions", "max_position_embeddings")
    found = [getattr(text, name, None) for name in names]
    # The position that it starts from is one of them.
    return min((each - 1 for each in found if isinstance(each, int) and each > 1), default=None)
