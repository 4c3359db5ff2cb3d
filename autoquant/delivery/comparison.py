"""Check that a model read back from disk is the one that was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.candidates.flat import same_bits
from autoquant.candidates.kernels.caches import untuned
from autoquant.errors import CheckpointError
from autoquant.models import LoadedModel
from autoquant.models.outputs import CHECK_TOKENS, output_tensor
from autoquant.runtime.inputs import start_ids

_ROUNDING_FLOAT32 = 2e-6
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def check_same(loaded: LoadedModel, again: nn.Module, target: Path) -> bool:
    """Check that the model read back is the one that was written.

    Their logits are compared, or their weights if the logits differ from run to run or by rounding.

    Returns:
        Whether the logits are the same.

    Raises:
        CheckpointError: The models differ.
    """
    inputs = check_inputs(loaded)
    before, after = logits(loaded.module, inputs), logits(again, inputs)
    if torch.equal(before, after):
        return True
    steady = torch.equal(before, logits(loaded.module, inputs))
    if (steady and not _is_rounding(before, after)) or not _same_weights(loaded.module, again):
        raise CheckpointError(
            f"what was written for {target} does not compute the same logits; please report this"
        )
    return False


def _is_rounding(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Check whether float32 outputs differ by no more than where in memory the weights lie.

    Products of one row are added up in another order there (seen: 2e-7).
    """
    if one.dtype != torch.float32 or one.shape != other.shape:
        return False
    return bool((other - one).norm() <= _ROUNDING_FLOAT32 * one.norm())


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(same_bits(first.data, second.data) for first, second in pairs)


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Check that two modules have the same parameters and buffers, bit for bit."""
    buffers = zip(one.buffers(), other.buffers(), strict=True)
    return _same_weights(one, other) and all(same_bits(a, b) for a, b in buffers)


def logits(module: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return what a model gives for inputs of `check_inputs`."""
    with torch.no_grad(), untuned():  # speed does not matter, and tuning takes minutes
        return output_tensor(module(*inputs[0], **inputs[1]))


def check_inputs(loaded: LoadedModel) -> Inputs:
    """Return positional and named arguments that two models are compared with.

    Raises:
        CheckpointError: The model has none.
    """
    inputs = loaded.example_inputs
    if loaded.kind == "encoder_decoder" and isinstance(inputs, dict):
        start = start_ids(loaded.module, 1, loaded.device)
        return (), inputs | {"decoder_input_ids": start}
    if inputs is not None:
        return ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    if loaded.kind in ("causal_lm", "token_lm"):
        tokens = min(CHECK_TOKENS, loaded.max_positions or CHECK_TOKENS)
        return (torch.arange(tokens, device=loaded.device).unsqueeze(0) % 32,), {}
    raise CheckpointError(
        "this model has no sample inputs to check a checkpoint with: "
        "search it with --sample-inputs, or use autoquant.apply from Python"
    )
