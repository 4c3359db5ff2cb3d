"""Find the tensor in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoquant.errors import WorkloadError
from autoquant.models.loaded import is_causal_lm

CHECK_TOKENS = 48
"""The length of a prompt by which the outputs of two models are compared: quick on a CPU, too."""


def run_on_tokens(module: nn.Module, ids: torch.Tensor) -> Any:
    """Run a model on token ids [batch, tokens], without a cache."""
    return module(ids, use_cache=False) if is_causal_lm(module) else module(ids)


def output_tensor(output: Any) -> torch.Tensor:
    """Return the tensor of a model's output: itself, `.logits`, or the first of a tuple.

    Raises:
        WorkloadError: There is none.
    """
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(output, (tuple, list)) and output:
        return output_tensor(output[0])
    if isinstance(output, Mapping) and output:
        return output_tensor(next(iter(output.values())))
    raise WorkloadError(
        f"the model returns {type(output).__name__}; a tensor or an object with .logits is needed"
    )
