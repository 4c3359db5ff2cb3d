"""Keys and values in 8 bits: codes, and a scale for each head and token.

A step of one token reads all keys and values of its sequence. With long prompts or many sequences
that takes longer than to read the weights, and takes more memory. A scale for each token lets a
token be written once and never again, and no token round another. It also holds what a head's
largest number needs, so nothing overflows.

Which format a model's `generate` uses is an attribute of the model, as it is a choice of its user.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from autoquant.devices import backend
from autoquant.errors import DeviceError, ModelError
from autoquant.records import KV_CACHES, KvCache, Workload

_ATTRIBUTE = "autoquant_kv_cache"
_LARGEST: dict[KvCache, float] = {"int8": 127.0, "float8": 448.0}
_LEAST_SCALE = 1e-30  # of a head whose numbers are all 0
_SCALE_BYTES = torch.float32.itemsize


class Codes(NamedTuple):
    """Keys or values of a layer, in place of a tensor of numbers.

    Attributes:
        codes: `[batch, heads, length, width]`, int8; of float8 their bits.
        scales: `[batch, heads, length]`, float32.
        kind: Which of the two.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    kind: KvCache

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers `[batch, heads, length, width]`."""
        codes = self.codes.view(torch.float8_e4m3fn) if self.kind == "float8" else self.codes
        return (codes.float() * self.scales.unsqueeze(-1)).to(dtype)


def codes_of(numbers: torch.Tensor, kind: KvCache) -> Codes:
    """Round numbers `[batch, heads, length, width]`, each head of a token by its largest number."""
    exact, largest = numbers.float(), _LARGEST[kind]
    scales = (exact.abs().amax(dim=-1) / largest).clamp(min=_LEAST_SCALE)
    shares = (exact / scales.unsqueeze(-1)).clamp(-largest, largest)
    if kind == "float8":
        return Codes(shares.to(torch.float8_e4m3fn).view(torch.int8), scales, kind)
    return Codes(shares.round().to(torch.int8), scales, kind)


def rounded(numbers: torch.Tensor, kind: KvCache) -> torch.Tensor:
    """Return what a cache gives back of numbers, in their dtype."""
    return codes_of(numbers, kind).numbers(numbers.dtype)


def kv_cache_of(model: nn.Module) -> KvCache | None:
    """Return how a model's `generate` keeps keys and values, or None for the model's dtype."""
    return cast("KvCache | None", getattr(model, _ATTRIBUTE, None))


def set_kv_cache(model: nn.Module, kind: str | None) -> None:
    """Choose how a model's `generate` keeps keys and values, in place.

    Args:
        kind: None for the model's dtype.

    Raises:
        ModelError: There is no such format, or the model keeps no keys and values, or something
            else as well.
        DeviceError: Its device cannot convert the numbers.
    """
    if kind is not None:
        if kind not in KV_CACHES:
            raise ModelError(
                f"keys and values cannot be kept in {kind!r}: give {' or '.join(KV_CACHES)}"
            )
        if reason := keeps_other(model):
            raise ModelError(f"keys and values cannot be kept in {kind}: {reason}")
        if reason := kv_cache_unsupported(next(model.parameters()).device, kind):
            raise DeviceError(reason)
        setattr(model, _ATTRIBUTE, kind)
    else:
        model.__dict__.pop(_ATTRIBUTE, None)


def keeps_other(model: Any) -> str:
    """Return why a model's keys and values cannot be kept as codes; empty if they can be."""
    from autoquant.models.loaded import is_causal_lm

    if not is_causal_lm(model):
        return f"a {type(model).__name__} is no causal language model of transformers"
    from autoquant.runtime.generate.cache import other_layers

    other = other_layers(model.config)
    return f"it keeps a {', '.join(other)}" if other else ""


def kv_cache_unsupported(device: torch.device | str, kind: KvCache) -> str:
    """Return why a device cannot keep keys and values so; empty if it can."""
    place = torch.device(device)
    if kind == "float8" and not backend(place).converts_float8():
        return (
            "keys and values in float8 need a GPU of compute capability 8.9 or higher: keep them"
            " in int8"
        )
    return ""


def bytes_of_a_sequence(model: Any, kind: KvCache | None, tokens: int) -> int | None:
    """Return the bytes of keys and values of one sequence, or None if the model hides its sizes.

    Args:
        tokens: Of the sequence.
    """
    config = model.config.get_text_config(decoder=True)
    layers, heads = (
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads")
    )
    if not layers or not heads:
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    item = next(model.parameters()).dtype.itemsize
    of_a_head = width * item if kind is None else width + _SCALE_BYTES
    return int(2 * layers * kv_heads * of_a_head * tokens)


def bytes_of_keys_and_values(model: Any, workload: Workload) -> int | None:
    """Return the bytes of one sequence of a workload, or None if the model keeps none."""
    if keeps_other(model):
        return None
    tokens = workload.prompt_tokens + workload.new_tokens
    return bytes_of_a_sequence(model, kv_cache_of(model), tokens)


@contextmanager
def rounding_in_passes(model: nn.Module, kind: KvCache | None) -> Iterator[None]:
    """Inside, whole forward passes attend to keys and values as a cache would give them back.

    So a pass over a window loses what the same tokens lose in `generate`, where each token reads
    those before it, and itself, from the cache.
    """
    if kind is None:
        yield
        return

    def with_cache(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("past_key_values") is not None:
            return args, kwargs
        return args, kwargs | {"past_key_values": _rounding_cache(module, kind), "use_cache": True}

    hook = model.register_forward_pre_hook(with_cache, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _rounding_cache(model: Any, kind: KvCache) -> Any:
    """Return a cache that keeps nothing, and gives back what it is given, rounded."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):  # type: ignore[misc]
        def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
            return rounded(keys, kind), rounded(values, kind)

    cache = DynamicCache(config=model.config)
    cache.layers = [Layer() for _ in cache.layers]
    return cache
