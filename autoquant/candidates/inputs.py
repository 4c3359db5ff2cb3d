"""What is known of a linear's input on a calibration text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch

from autoquant.errors import CandidateError

_DAMPING = 0.01  # of the mean of the Hessian's diagonal
_DAMPING_ATTEMPTS = 4
_MAGNITUDES = 1 << 15  # of bfloat16
_SHRINKS = torch.linspace(0, -10, 41, device="cpu").exp2().tolist()
_SMALLEST, _LARGEST_SQUARE = 1e-12, 1e300


class InputStatistics:
    """Statistics of a linear's input on the calibration text.

    Linears that read the same input share one object.

    Attributes:
        largest: Float32 `[k]`, the largest magnitude of each column, or None if it is not known.
        magnitudes: Float64 `[32768]`, how much the numbers of each bfloat16 magnitude count: each
            one over the mean square of its row. None if that is not known.

    Args:
        hessian: What `hessian` returns, or makes it when it is needed.
    """

    def __init__(
        self,
        hessian: torch.Tensor | Callable[[], torch.Tensor],
        magnitudes: torch.Tensor | None = None,
        largest: torch.Tensor | None = None,
    ) -> None:
        self._given = hessian
        self.largest = largest
        self.magnitudes = magnitudes
        self._padded: dict[int, InputStatistics] = {}

    @classmethod
    def of(cls, rows: torch.Tensor) -> InputStatistics:
        """Return the statistics of an input `[rows, k]`."""
        rows = rows.float()
        return cls(rows.t() @ rows, _magnitudes(rows), rows.abs().amax(0))

    def add(self, other: InputStatistics) -> None:
        """Add the statistics of more rows of the same input."""
        self.hessian.add_(other.hessian)
        if self.magnitudes is not None and other.magnitudes is not None:
            self.magnitudes.add_(other.magnitudes)
        if self.largest is not None and other.largest is not None:
            torch.maximum(self.largest, other.largest, out=self.largest)

    def copy(self) -> InputStatistics:
        """Return the same statistics in new memory."""
        beside = (self.magnitudes, self.largest)
        return InputStatistics(
            self.hessian.clone(), *(None if each is None else each.clone() for each in beside)
        )

    @functools.cached_property
    def hessian(self) -> torch.Tensor:
        """Return the sum of x x' over the rows x of the input, float32 `[k, k]`.

        It is half the Hessian of each output's squared error with respect to its weights.
        """
        return self._given() if callable(self._given) else self._given

    def range(self, rounding: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the largest magnitude `[]`, float32, that is worth holding.

        It is the one with the least squared error, relative to each row's mean square: a few rows
        with huge numbers must not cost all others their resolution. Up to the largest number,
        ranges that differ by a quarter of a power of two are tried.

        Args:
            rounding: Rounds numbers in a range, of which it gets the largest magnitude `[]`.

        Raises:
            CandidateError: The inputs are not finite, or not known.
        """
        counts = self.magnitudes
        if counts is None:
            raise CandidateError("the layer's inputs on the calibration text are not known")
        values = _magnitude_values(counts.device)
        there = counts > 0
        if not bool(counts.isfinite().all() & values[there].isfinite().all()):
            raise CandidateError("the layer's inputs on the calibration text are not finite")
        values, counts = values[there], counts[there]
        if not len(values):
            raise CandidateError("the calibration text does not reach the layer")
        ranges = values.amax().clamp(min=_SMALLEST) * torch.tensor(_SHRINKS, device=values.device)
        errors = [((rounding(values, each) - values) ** 2 * counts).sum() for each in ranges]
        return ranges[torch.stack(errors).argmin()]

    def padded(self, more: int) -> InputStatistics:
        """Return the statistics of an input with as many zeros appended."""
        if more not in self._padded:
            hessian = torch.nn.functional.pad(self.hessian, (0, more, 0, more))
            self._padded[more] = InputStatistics(hessian, self.magnitudes)
        return self._padded[more]

    @functools.cached_property
    def inverse_factor(self) -> torch.Tensor:
        """Return U `[k, k]`, upper triangular, with U' U = inverse of the damped Hessian.

        The damping is 1 % of the mean of the diagonal, as in GPTQ. It is multiplied by ten until
        the matrix is positive definite, at most three times.

        Raises:
            CandidateError: The inputs were not finite, or no damping sufficed.
        """
        diagonal = self.hessian.diagonal()
        if not bool(diagonal.isfinite().all()):
            raise CandidateError("the layer's inputs on the calibration text are not finite")
        dead = (diagonal == 0).to(diagonal.dtype)  # inputs that are always 0 get a 1 there
        damping = _DAMPING * diagonal.mean()
        for _ in range(_DAMPING_ATTEMPTS):
            damped = self.hessian + torch.diag(dead + damping)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                inverse = torch.cholesky_inverse(factor)
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not failed:
                    return cast(torch.Tensor, upper)
            damping = 10 * damping
        raise CandidateError(
            "the layer's inputs on the calibration text have no positive definite Hessian"
        )


def _magnitudes(rows: torch.Tensor) -> torch.Tensor:
    """Return the `magnitudes` of float32 rows `[rows, k]`.

    On a GPU, numbers are added in any order. In float64, that does not change which range is best.
    """
    counts = 1 / rows.double().square().mean(-1, keepdim=True).clamp(_SMALLEST, _LARGEST_SQUARE)
    numbers = rows.to(torch.bfloat16).view(torch.int16).to(torch.int64) & (_MAGNITUDES - 1)
    return torch.bincount(
        numbers.flatten(), weights=counts.expand_as(rows).flatten(), minlength=_MAGNITUDES
    )


def _magnitude_values(device: torch.device) -> torch.Tensor:
    """Return all magnitudes of bfloat16 in order, as float32 `[32768]`."""
    numbers = torch.arange(_MAGNITUDES, device=device)
    return numbers.to(torch.int16).view(torch.bfloat16).float()
