"""What a program computes: one call of a module, or a step of a language model over its cache."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from autoquant.errors import PlanError, first_line
from autoquant.runtime.generate.cache import Places, static_cache, takes_made_mask


class Call(nn.Module):
    """One call of a module. Of what it returns, plain containers and tensors are kept.

    Args:
        names: The last inputs are passed on by these names: PyTorch 2.13 cannot leave dimensions
            open of inputs that are given by name.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self._names = names

    def forward(self, *inputs: Any) -> Any:
        first = len(inputs) - len(self._names)
        named = dict(zip(self._names, inputs[first:], strict=True))
        output = self.module(*inputs[:first], **named)
        if isinstance(output, Mapping):  # a class of transformers, which readers may lack
            return {name: each for name, each in output.items() if isinstance(each, torch.Tensor)}
        return output


class Step(nn.Module):
    """Takes some tokens of each sequence in, and returns logits after the last one.

    Args:
        model: A causal language model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, start: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """Run the step.

        Args:
            ids: Token ids `[batch, tokens]`.
            start: How many places of the cache are filled, int64 `[]`.
            cache: Keys and values of each layer in turn, `[batch, heads, places, width]`. Those of
                the tokens are written into them.

        Returns:
            Logits `[batch, vocabulary]`.
        """
        model: Any = self.model
        batch, tokens = ids.shape
        length = cache[0].shape[2]
        index = start + torch.arange(tokens, device=ids.device)
        positions = index.expand(batch, tokens)
        state: Any = SimpleNamespace(
            _all=range(_NO_LENGTH), filled=start, now=Places(index, positions)
        )
        kept = static_cache(model, state)
        for layer, keys, values in zip(kept.layers, cache[::2], cache[1::2], strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
        seen = (torch.arange(length, device=ids.device) <= index[:, None])[None, None]
        keeps = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        output = model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=seen.expand(batch, -1, -1, -1),
            past_key_values=kept,
            use_cache=True,
            return_dict=True,
            **keeps,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


_NO_LENGTH = 1 << 30
"""Stands for the length of a cache, which is read for windows only."""


def check_step(model: nn.Module) -> None:
    """Refuse a language model whose steps no program can hold.

    Raises:
        PlanError: It attends in windows, or keeps something else than keys and values.
    """
    if not takes_made_mask(model):
        raise PlanError(
            "programs are for language models that attend to all that came before, and this one"
            " has windows, or attention of its own: `autoquant apply` writes this one"
        )
    try:
        cache_shapes(model)
    except TypeError as error:
        raise PlanError(
            f"programs are for language models with a cache of keys and values, and"
            f" {first_line(error)}: `autoquant apply` writes this one"
        ) from error


def cache_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Return heads and width of each tensor of the cache, keys and values of each layer in turn.

    Raises:
        TypeError: The model keeps something else.
    """
    device = next(model.parameters()).device
    places = Places(*(torch.zeros(size, dtype=torch.long, device=device) for size in (1, (1, 1))))
    state: Any = SimpleNamespace(_all=range(1), filled=places.index[0], now=places)
    kept = static_cache(model, state)
    with torch.no_grad():
        model(input_ids=places.positions, past_key_values=kept, use_cache=True)
    return [
        (tensor.shape[1], tensor.shape[3])
        for layer in kept.layers
        for tensor in (layer.keys, layer.values)
    ]


def new_cache(model: nn.Module, batch: int, places: int) -> list[torch.Tensor]:
    """Return an empty cache for a step."""
    like = next(model.parameters())
    return [
        torch.zeros(batch, heads, places, width, dtype=_dtype(model), device=like.device)
        for heads, width in cache_shapes(model)
    ]


def _dtype(model: nn.Module) -> torch.dtype:
    dtype = model.dtype
    assert isinstance(dtype, torch.dtype)  # of every model of transformers
    return dtype
