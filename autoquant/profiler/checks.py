"""Checks of a candidate that is timed: before the timing, and again after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from autoquant.candidates.check import changed, fault, relative_error

_FEWEST_CALLS, _MOST_CALLS = 4, 200
_WAIT = 10
"""The calls end after so many times as long, however little was computed."""

Outputs = Sequence[torch.Tensor]
"""What one call computes: several linears with the same numbers."""


class ResultCheck:
    """Checks the results of one prepared candidate on real weights.

    Args:
        run: Calls the code that is timed, and returns its outputs.
        eager: The same without a compiler, or None if `run` is not compiled.
        expected: Returns the float32 reference for the present inputs.
        dtype: The dtype of an output.
        repeats: The same inputs must give the same bits each time.
    """

    def __init__(
        self,
        run: Callable[[], Outputs],
        eager: Callable[[], Outputs] | None,
        expected: Callable[[], torch.Tensor],
        *,
        dtype: torch.dtype,
        repeats: bool,
    ) -> None:
        self._run, self._eager, self._expected = run, eager, expected
        self._dtype, self._repeats = dtype, repeats

    def before(self) -> tuple[float, str]:
        """Return the relative error, and what is wrong with the results or an empty string."""
        with torch.no_grad():
            expected = self._expected()
            outputs = self._run()
            wrong = self._wrong(outputs, expected)
            if not wrong and self._eager is not None:
                reason = self._wrong(self._eager(), expected)
                wrong = f"run eagerly: {reason}" if reason else ""
            return relative_error(outputs[0], expected), wrong

    def after(self, repeat_s: float) -> str:
        """Return what is wrong after the timing, or an empty string.

        The inputs should hold other numbers than before, in the same memory.

        Args:
            repeat_s: Call again and again for about that time, and compare every result. It is
                computing time of this thread: a busy machine must not make the check a weaker one.
        """
        with torch.no_grad():
            expected = self._expected()
            outputs = self._run()
            if reason := self._wrong(outputs, expected):
                return f"right before it was timed, wrong after: {reason}"
            end_s, latest_s = time.thread_time() + repeat_s, time.perf_counter() + _WAIT * repeat_s
            for number in range(2, _MOST_CALLS + 2):
                if reason := self._differs(self._run(), outputs, expected):
                    return f"call {number} after it was timed: {reason}"
                ended = time.thread_time() > end_s or time.perf_counter() > latest_s
                if number > _FEWEST_CALLS and ended:
                    break
        return ""

    def _wrong(self, outputs: Outputs, expected: torch.Tensor) -> str:
        reasons = (fault(y, expected, self._dtype) for y in outputs)
        return next(filter(None, reasons), "")

    def _differs(self, outputs: Outputs, before: Outputs, expected: torch.Tensor) -> str:
        """Return what is wrong with results that should be those of the call before."""
        for y, first in zip(outputs, before, strict=True):
            if not changed(y, first):
                continue
            if reason := fault(y, expected, self._dtype):
                return reason
            if self._repeats:
                difference = relative_error(y, first.float())
                return f"the same input gave other bits (relative difference {difference:.2g})"
        return ""
