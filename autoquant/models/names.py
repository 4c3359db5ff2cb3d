"""Undo what training programs and compilers add to the names of stored weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

# Parts of names that wrappers add anywhere: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What old versions of transformers stored and its models now compute.
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_MASKS = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.(masked_)?bias$")


def renamed(state: Mapping[str, Any], module: nn.Module, base: str = "") -> dict[str, Any]:
    """Return the state under the names that it has in `module`; see `fitted`."""
    return {new: state[stored] for stored, new in fitted(state, module.state_dict(), base).items()}


def fitted(names: Collection[str], wanted: Collection[str], base: str) -> dict[str, str]:
    """Map stored names to those of the model. Names do not change if nothing fits better.

    Args:
        wanted: The model's own names.
        base: The prefix that names lack if the model was saved without its head, e.g. `model`.
    """
    wanted = set(wanted)

    def fit(way: dict[str, str]) -> int:
        return sum(name in wanted for name in way.values())

    return max(_ways(names, wanted, base), key=fit)


def _ways(names: Collection[str], wanted: Collection[str], base: str) -> Iterator[dict[str, str]]:
    """Yield ways to name the same weights, with ever shorter prefixes."""
    yield {name: name for name in names}
    plain = {}
    for name in names:
        own_parts = [part for part in name.split(".") if part not in _WRAPPERS]
        plain[name] = ".".join(own_parts)
    while True:
        way = {name: _with_base(short, wanted, base) for name, short in plain.items()}
        if len(set(way.values())) == len(names):
            yield way
        first = {short.partition(".")[0] for short in plain.values()}
        # Only a part that all names begin with can be a training program's.
        if len(first) != 1 or not all("." in short for short in plain.values()):
            return
        plain = {name: short.partition(".")[2] for name, short in plain.items()}


def _with_base(name: str, wanted: Collection[str], base: str) -> str:
    return f"{base}.{name}" if name not in wanted and f"{base}.{name}" in wanted else name


def is_computed(name: str, value: Any, module: nn.Module) -> bool:
    """Check whether a value without a place in `module` is a buffer that it computes itself."""
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, name) for pattern in patterns) or _FREQUENCIES.search(name):
        return True
    return bool(_MASKS.search(name)) and isinstance(value, torch.Tensor) and value.dim() != 1


def without_aliases(
    state: Mapping[str, Any], ties: Collection[Collection[str]]
) -> tuple[dict[str, Any], list[str]]:
    """Keep each tied weight once, under the first of its names.

    Returns:
        The state, and names that the model ties but whose values differ.
    """
    kept, different = dict(state), []
    for group in ties:
        first, *rest = [name for name in group if name in state] or [""]
        for name in rest:
            kept.pop(name)
            own, value = state[first], state[name]
            # Most are stored once: then there is nothing to compare.
            if value.data_ptr() != own.data_ptr() and not torch.equal(value, own):
                different += [first, name]
        if first and first != next(iter(group)):
            kept[next(iter(group))] = kept.pop(first)
    return kept, different
