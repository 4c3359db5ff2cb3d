"""Masks of 2:4 sparsity: which two of every four weights along k are kept.

Each function takes a weight `[n, k]` and the layer's inputs, and returns the float32 weight with
two of every four numbers zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from autoquant.candidates.inputs import InputStatistics

FOUR, KEPT = 4, 2
_COLUMNS_AT_ONCE = 128

Mask = Callable[[torch.Tensor, InputStatistics | None], torch.Tensor]
"""Maps (weight `[n, k]`, the layer's inputs or None) to the sparse float32 weight."""


def by_magnitude(weight: torch.Tensor, _inputs: InputStatistics | None = None) -> torch.Tensor:
    """Keep the largest two of every four."""
    return _kept(weight.float(), weight.float().abs())


def by_inputs(weight: torch.Tensor, inputs: InputStatistics | None = None) -> torch.Tensor:
    """Keep the two with the largest product of the weight and the norm of its input.

    See Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda),
    2023.
    """
    assert inputs is not None  # `Format.store` checks that
    norms = inputs.hessian.diagonal().sqrt()
    return _kept(weight.float(), weight.float().abs() * norms)


def compensated(weight: torch.Tensor, inputs: InputStatistics | None = None) -> torch.Tensor:
    """Let later columns make up for what is dropped, as GPTQ does for what is rounded.

    The two to keep are chosen when their four's turn comes. See Frantar and Alistarh, "SparseGPT:
    Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
    """
    assert inputs is not None
    factor = inputs.inverse_factor
    k = weight.shape[1]
    left = weight.float().t().contiguous()  # `[k, n]`, as in `rounding.gptq`
    for start in range(0, k, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, k)
        errors = torch.zeros(stop - start, left.shape[1], device=weight.device)
        for column in range(start, stop):
            if column % FOUR == 0:
                four = slice(column, column + FOUR)
                cost = left[four] / factor.diagonal()[four].unsqueeze(1)
                keeps = _largest(cost.abs().t()).t()
            dropped = left[column] * ~keeps[column % FOUR]
            left[column] -= dropped
            error = dropped / factor[column, column]
            errors[column - start] = error
            left[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return left.t().contiguous()


def _kept(weight: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
    """Return the weight without the two of each four that are worth least."""
    return weight * _largest(worth.reshape(-1, FOUR)).reshape(weight.shape)


def _largest(fours: torch.Tensor) -> torch.Tensor:
    """Return where the largest two of each row `[rows, 4]` are. Of equals, the first ones count."""
    order = fours.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, order[:, :KEPT], value=True)
