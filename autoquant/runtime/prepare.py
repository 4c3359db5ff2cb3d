"""Models made as fast in the user's own loop as their plan allows."""

from __future__ import annotations

from torch import nn

from autoquant.candidates.linears import take_apart
from autoquant.models.attention import unfuse_encoders
from autoquant.models.loaded import is_causal_lm


def prepare(model: nn.Module) -> nn.Module:
    """Make a model compute as fast as it can without any further call, in place.

    Quantized linears are taken apart (see `autoquant.candidates.linears`). A causal language model
    of transformers gets a `generate` that replays its steps (see
    `autoquant.runtime.generate.generation`). An unquantized model is prepared in the same way.

    Returns:
        The same module.
    """
    take_apart(model)
    unfuse_encoders(model)
    if is_causal_lm(model):
        from autoquant.runtime.generate.generation import give_fast_generate

        give_fast_generate(model)
    return model
