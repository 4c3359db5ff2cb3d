"""Models made as fast in the user's own loop as their plan allows."""

from __future__ import annotations

from torch import nn

from autoquant.candidates.linears import take_apart
from autoquant.models.attention import unfuse_encoders
from autoquant.models.loaded import is_causal_lm
from autoquant.records import KV_CACHE_OFF


def prepare(model: nn.Module, *, kv_cache: str | None = None) -> nn.Module:
    """Make a model compute as fast as it can without any further call, in place.

    Quantized linears are taken apart (see `autoquant.candidates.linears`). A causal language model
    of transformers gets a `generate` that replays its steps (see
    `autoquant.runtime.generate.generation`). An unquantized model is prepared in the same way.

    Args:
        kv_cache: How `generate` keeps keys and values: `int8` or `float8`, with a scale for each
            head and token, or `off` for the model's dtype. None leaves it as it is, which is `off`
            unless it was chosen before.

    Returns:
        The same module.

    Raises:
        ModelError: The model keeps no keys and values, or something else as well.
        DeviceError: Its device cannot keep them so.
    """
    take_apart(model)
    unfuse_encoders(model)
    if is_causal_lm(model):
        from autoquant.runtime.generate.generation import give_fast_generate

        give_fast_generate(model)
    if kv_cache is not None:
        from autoquant.runtime.generate.kv_codes import set_kv_cache

        set_kv_cache(model, None if kv_cache == KV_CACHE_OFF else kv_cache)
    return model
