"""Losses of a language model on long windows of a text, with a cache of keys and values or none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from autoquant.errors import TextError
from autoquant.evaluators.logits import window_loss
from autoquant.evaluators.quality import next_token_logits
from autoquant.evaluators.text import beginning
from autoquant.files import MOST_TEXT_BYTES
from autoquant.records import KvCache
from autoquant.runtime.generate.kv_codes import rounding_in_passes

MOST_WINDOWS = 8
LEAST_WINDOWS = 2
"""For an interval."""


def long_windows(pieces: Iterable[str], name: str, tokenizer: Any, tokens: int) -> torch.Tensor:
    """Return separate windows of a text, token ids `[windows, tokens]`.

    Each begins with what the tokenizer puts before every text.

    Args:
        pieces: The text. Reading stops when there are enough tokens.
        name: Of the text, in messages.

    Raises:
        TextError: The text is too short.
    """
    begin = beginning(tokenizer)
    own = tokens - len(begin)
    found: list[int] = []
    read = 0
    for piece in pieces:
        found += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        read += len(piece)
        if len(found) >= MOST_WINDOWS * own or read > MOST_TEXT_BYTES:
            break
    count = min(len(found) // own, MOST_WINDOWS) if own > 0 else 0
    if count < LEAST_WINDOWS:
        raise TextError(
            f"{name} gives {len(found)} tokens, and {LEAST_WINDOWS} windows of {tokens} are the"
            " least: give a longer text with --eval-text, or a lower --context"
        )
    text = torch.tensor(found[: count * own], dtype=torch.long).reshape(count, own)
    return torch.cat([torch.tensor(begin, dtype=torch.long).expand(count, -1), text], dim=1)


def losses_with(
    module: nn.Module, windows: torch.Tensor, kind: KvCache | None, device: str
) -> tuple[float, ...]:
    """Return each window's mean negative log-likelihood in nats, without its first token.

    Args:
        windows: Token ids `[windows, tokens]`.
        kind: How keys and values are kept; None for the model's dtype.
    """
    losses = []
    with rounding_in_passes(module, kind):
        for window in windows:
            ids = window.unsqueeze(0).to(device)
            losses.append(window_loss(next_token_logits(module, ids), ids))
    return tuple(losses)
