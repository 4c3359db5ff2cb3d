"""How a prepared candidate is timed: by the host's clock, or as a CUDA graph by the device's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from autoquant.devices.device import synchronize

_HOST_SAMPLE_S = 2e-3
_GRAPH_US = 1000.0
_MOST_CALLS = 256

Call = Callable[[int], object]
"""Computes with the weights at a position of the rotation."""


class Clock(Protocol):
    """Times one candidate. `start` warms it up; each `sample` gives microseconds for one linear."""

    def start(self) -> None: ...

    def sample(self) -> float: ...


class HostClock:
    """Many calls between two readings of the host's clock.

    Args:
        call: Does `linears` linears at once.
        positions: How many positions the rotation has.
    """

    def __init__(self, call: Call, positions: int, linears: int, device: str) -> None:
        self._call = call
        self._positions = positions
        self._linears = linears
        self._device = device
        self._position = 0
        self._calls = 1

    def start(self) -> None:
        """One sample, thrown away, which also tells how many calls make a sample."""
        seconds = self.sample() * self._linears / 1e6
        self._calls = max(1, round(_HOST_SAMPLE_S / max(seconds, 1e-7)))

    def sample(self) -> float:
        synchronize(self._device)
        start = time.perf_counter()
        for _ in range(self._calls):
            self._call(self._position)
            self._position = (self._position + 1) % self._positions
        synchronize(self._device)
        return (time.perf_counter() - start) / (self._calls * self._linears) * 1e6


class GraphClock:
    """Calls through the whole rotation, captured in one CUDA graph, so that gaps between launches are those of a model.

    The graph is about a millisecond long and passes through every position, which keeps weights cold from one replay to the
    next; a call that takes longer than that by itself is captured alone.
    """

    def __init__(self, call: Call, positions: int, device: str) -> None:
        self._call = call
        self._positions = positions
        self._device = torch.device(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 1

    def start(self) -> None:
        """Capture and replay once.

        Raises:
            RuntimeError: The candidate does something that a CUDA graph cannot hold.
        """
        with torch.cuda.device(self._device):
            self._warm_up()
            self._calls = self._count(self._capture(1))
            if self._calls > 1:
                self._capture(self._calls)
            self.sample()

    def sample(self) -> float:
        assert self._graph is not None
        with torch.cuda.device(self._device):
            start, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            start.record()
            self._graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / self._calls

    def _warm_up(self) -> None:
        """Run on a stream of its own, as capturing demands."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for position in range(min(2, self._positions)):
                self._call(position)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def _capture(self, calls: int) -> float:
        """Capture `calls` calls; returns microseconds of one call in a first replay."""
        self._calls = calls
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for number in range(calls):
                self._call(number % self._positions)
        self.sample()
        return self.sample()

    def _count(self, one_us: float) -> int:
        if one_us >= _GRAPH_US:
            return 1
        rounds = max(1, round(_GRAPH_US / (one_us * self._positions)))
        return max(self._positions, min(rounds * self._positions, _MOST_CALLS))
