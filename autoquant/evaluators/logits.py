"""What logits say of a text: losses and divergences, in nats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

ROWS_AT_ONCE = 128

_Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class WindowComparison:
    """One window by a model and by the unquantized one.

    Attributes:
        loss, reference_loss: Mean negative log-likelihood of tokens 2 to last.
        divergence: KL(unquantized || model), summed over the window's tokens.
    """

    loss: float
    reference_loss: float
    divergence: float


def compare_window(
    reference: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, *, compiled: bool = False
) -> WindowComparison:
    """Compare logits `[tokens, vocabulary]` of two models on a window `[1, tokens]`.

    Args:
        compiled: In one compiled pass, which takes seconds to compile once for each size.
    """
    # The last token has no successor: it gets any target, which does not count.
    targets = ids[0].roll(-1)
    if compiled:
        divergence, loss, reference_loss = _compiled(_by_row)(reference, logits, targets)
    else:
        starts = range(0, len(targets), ROWS_AT_ONCE)
        slices = [slice(start, start + ROWS_AT_ONCE) for start in starts]
        found = [_by_row(reference[rows], logits[rows], targets[rows]) for rows in slices]
        divergence, loss, reference_loss = map(torch.cat, zip(*found, strict=True))
    return WindowComparison(
        loss=_total(loss[:-1]) / (len(targets) - 1),
        reference_loss=_total(reference_loss[:-1]) / (len(targets) - 1),
        divergence=_total(divergence),
    )


def window_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the mean negative log-likelihood of tokens 2 to last.

    Args:
        logits: `[tokens, vocabulary]`.
        ids: `[1, tokens]`.
    """
    targets = ids[0, 1:]
    found = []
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(targets)))
        found.append(_losses(F.log_softmax(logits[rows].float(), dim=-1), targets[rows]))
    return _total(torch.cat(found)) / len(targets)


def divergence_sum(
    reference: torch.Tensor, logits: torch.Tensor, *, compiled: bool = False
) -> float:
    """Return KL(reference || model), summed over rows.

    Args:
        reference: Logits `[rows, vocabulary]`.
        logits: The model's logits `[rows, vocabulary]`.
        compiled: In one compiled pass, which takes seconds to compile once for each size.
    """
    if compiled:
        return _total(_compiled(_divergence)(reference, logits))
    parts = []
    for start in range(0, logits.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        parts.append(_divergence(reference[rows], logits[rows]))
    return _total(torch.cat(parts))


def _divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the divergence of each row."""
    log_p = F.log_softmax(reference.float(), dim=-1)
    log_q = F.log_softmax(logits.float(), dim=-1)
    return _from_logs(log_p, log_q)


def _by_row(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> _Rows:
    """Return the divergence and both losses of each row."""
    log_p = F.log_softmax(reference.float(), dim=-1)
    log_q = F.log_softmax(logits.float(), dim=-1)
    divergence = _from_logs(log_p, log_q)
    return divergence, _losses(log_q, targets), _losses(log_p, targets)


def _from_logs(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _losses(log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_p.gather(1, targets[:, None])[:, 0]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _total(rows: torch.Tensor) -> float:
    return float(rows.double().sum().item())
