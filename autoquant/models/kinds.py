"""Find out by running a module what it is, and what its text may hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates.calls import LinearHook
from autoquant.models.casting import cast
from autoquant.models.copies import own_copy
from autoquant.models.loaded import UNFIT, ModelKind, is_causal_lm, main_dtype
from autoquant.models.outputs import output_tensor, run_on_tokens
from autoquant.models.streaming import stream_of

_EMBEDDINGS = (F.embedding, torch.embedding, torch.ops.aten.embedding.default)
_PADDED = 2  # embeddings may be padded, to fewer than this many times the scores
_PREFIX_TOKENS = 4
PROBE_TOKENS = 16
_PROBES = 3
# A mixture of experts rounds differently with other tokens beside: by 2e-7 in float32. Without a
# causal mask, tiny models with random weights show 1e-2 and more (studies/reliability).
_ROUNDING_FLOAT32 = 1e-4
_ROUNDING_FLOAT16 = 1e-2
_LARGEST_COPY_BYTES = 8 << 30


class _EmbeddingWatcher(LinearHook):
    """Notes how many rows the embeddings have that are looked up with the token ids."""

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self.rows: list[int] = []
        self._ids = ids.flatten().cpu()

    def on_other(self, function: Any, arguments: Sequence[Any]) -> None:
        if function not in _EMBEDDINGS:
            return
        tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
        weights = [each for each in tensors if each.is_floating_point()]
        read = [each for each in tensors if not each.is_floating_point()]
        if weights and read and torch.equal(read[0].flatten().cpu(), self._ids):
            self.rows.append(weights[0].shape[0])


def embedding_rows(module: nn.Module, device: str) -> int | None:
    """Return how many token ids a module has an embedding for, or None if that is not seen."""
    ids = torch.tensor([[1, 0]], device=device)  # positions count upwards, so these are none
    watcher = _EmbeddingWatcher(ids)
    with suppress(*UNFIT), watcher, torch.no_grad():
        run_on_tokens(module, ids)
    return min(watcher.rows, default=None)


def is_token_lm(module: nn.Module, device: str) -> bool:
    """Check whether two token ids [1, 2] on `device` give logits [1, 2, vocab]."""
    ids = torch.tensor([[0, 1]], device=device)
    try:
        with torch.no_grad():
            output = module(ids)
    except UNFIT:
        return False
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        return False
    if logits.dim() != 3 or logits.shape[:2] != (1, 2):
        return False
    # A classifier of tokens gives a few scores per token, not one for every id.
    return logits.shape[-1] * _PADDED >= (embedding_rows(module, device) or 0)


def model_kind(module: nn.Module, device: str, *, may_be_lm: bool) -> ModelKind:
    """Find the kind of a settled module.

    Args:
        may_be_lm: There is reason to try it on token ids.
    """
    if is_causal_lm(module):
        return "causal_lm"
    return "token_lm" if may_be_lm and is_token_lm(module, device) else "module"


def sees_ahead(module: nn.Module, device: str, vocabulary: int) -> float:
    """Return how much the last tokens change the logits of the first ones, relative to these.

    It is 0 for a causal model: its own rounding is taken off. If a model of 16-bit floats is not
    exact, a copy in float32 decides.

    Args:
        vocabulary: Ids below this are used.
    """
    shift, limit = min(_shifts(module, device, vocabulary)), _ROUNDING_FLOAT32
    if shift and main_dtype(module) in (torch.float16, torch.bfloat16):
        wide_bytes = 4 * sum(each.numel() for each in module.parameters())
        if stream_of(module) is not None or wide_bytes > _LARGEST_COPY_BYTES:
            limit = _ROUNDING_FLOAT16
        else:
            exact = own_copy(module)
            cast(exact, torch.float32, device)
            shift = min(_shifts(exact, device, vocabulary))
    return shift if shift > limit else 0.0


def _shifts(module: nn.Module, device: str, vocabulary: int) -> Iterator[float]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(_PROBES):
        ids = torch.randint(vocabulary, (PROBE_TOKENS,), generator=generator)
        one, other = ids.clone(), ids.clone()
        # The same token all over: different ones would average out.
        one[_PREFIX_TOKENS:] = ids[-1]
        other[_PREFIX_TOKENS:] = (ids[-1] + vocabulary // 2) % vocabulary
        first, second = (_first_logits(module, each.to(device)) for each in (one, other))
        yield ((first - second).norm() / first.norm().clamp_min(1e-12)).item()


def _first_logits(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = output_tensor(run_on_tokens(module, ids.unsqueeze(0)))
    return logits[0, :_PREFIX_TOKENS].double()
