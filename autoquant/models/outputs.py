"""The tensor that a model returns, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autoquant.errors import WorkloadError


def output_tensor(output: Any) -> torch.Tensor:
    """The tensor of a model's output: itself, `.logits`, or the first of a tuple."""
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(output, (tuple, list)) and output:
        return output_tensor(output[0])
    if isinstance(output, Mapping) and output:
        return output_tensor(next(iter(output.values())))
    raise WorkloadError(f"the model returns {type(output).__name__}; a tensor or an object with .logits is needed")
