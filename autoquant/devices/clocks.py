"""Clocks that time a prepared candidate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

Call = Callable[[int], object]
"""Computes with the weights at a position of the rotation."""


class Clock(Protocol):
    """Times one candidate.

    `start` warms it up; each `sample` returns microseconds of one linear. `go_to` lets the next
    sample begin at a share of the rotation (0 to 1), if samples do not pass through all of it.
    """

    def start(self) -> None: ...

    def go_to(self, share: float) -> None: ...

    def sample(self) -> float: ...


class HostClock:
    """Many calls between two readings of the host's clock.

    Args:
        call: Computes `linears` linears at once.
        positions: Positions of the rotation.
        synchronize: Waits until the device has finished.
        sample_s: Length of one sample.
    """

    def __init__(
        self,
        call: Call,
        positions: int,
        *,
        linears: int,
        synchronize: Callable[[], None],
        sample_s: float,
    ) -> None:
        self._call = call
        self._positions = positions
        self._linears = linears
        self._synchronize = synchronize
        self._sample_s = sample_s
        self._position = 0
        self._calls = 1

    def start(self) -> None:
        """Take one sample, only to find how many calls make a sample."""
        seconds = self.sample() * self._linears / 1e6
        self._calls = max(1, round(self._sample_s / max(seconds, 1e-7)))

    def go_to(self, share: float) -> None:
        self._position = int(share * self._positions) % self._positions

    def sample(self) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(self._calls):
            self._call(self._position)
            self._position = (self._position + 1) % self._positions
        self._synchronize()
        return (time.perf_counter() - start) / (self._calls * self._linears) * 1e6
