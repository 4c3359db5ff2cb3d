"""What the decoder of a model should say to each row: a dataset's answer, or else the model's own.

The unquantized model's greedy answer is the text on which its next-token probabilities are compared
with those of plans.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autoquant.evaluators.rows import JudgedRows, Rows
from autoquant.models.loaded import device_of
from autoquant.models.reader import on
from autoquant.runtime.inputs import start_ids
from autoquant.runtime.user_loop import generate_from

_ANSWER_TOKENS = 32


def with_answers(module: nn.Module, judged: JudgedRows) -> JudgedRows:
    """Return rows whose inputs say what the decoder reads.

    Args:
        module: The unquantized model.
    """
    parts = {
        part: tuple(_answered(module, rows) for rows in own) for part, own in judged.parts.items()
    }
    return replace(judged, parts=parts)


def _answered(module: nn.Module, rows: Rows) -> Rows:
    count, device = len(next(iter(rows.inputs.values()))), device_of(module)
    start = start_ids(module, count, device)
    if rows.labels is not None:
        said = rows.labels.to(device)
        return replace(rows, inputs=_read(rows, torch.cat([start, said[:, :-1]], dim=1)))
    said = generate_from(module, on(rows.inputs, device), _ANSWER_TOKENS, num_beams=1)
    if not bool((said[:, :1] == start).all()):
        said = torch.cat([start, said], dim=1)
    read, told = said[:, :-1], said[:, 1:]
    return Rows(_read(rows, read), counted=_until_end(module, told).cpu())


def _read(rows: Rows, decoder_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return rows.inputs | {"decoder_input_ids": decoder_ids.cpu().contiguous()}


def _until_end(module: nn.Module, said: torch.Tensor) -> torch.Tensor:
    """Return which tokens `[rows, tokens]` of answers are not behind their end."""
    settings: Any = getattr(module, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    if ends is None:
        return torch.ones_like(said, dtype=torch.bool)
    listed = torch.tensor(ends if isinstance(ends, list) else [ends], device=said.device)
    ended = torch.isin(said, listed).cumsum(1)
    before = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1)
    return before == 0
