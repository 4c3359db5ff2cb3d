"""Calls captured as CUDA graphs, so that the host adds no gaps between their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autoquant.devices.clocks import Call

_GRAPH_US = 1000.0
MOST_CALLS = 256
_WARM_UP_CALLS = 2


class GraphClock:
    """Calls through the whole rotation, captured in one CUDA graph.

    The gaps between launches are those of a model. The graph is about a millisecond long and passes
    through every position, which keeps weights cold from one replay to the next. Where there would
    be more positions than `MOST_CALLS`, there are only as many, which may fit into the cache: what
    lies there is replaced before each replay. A call that takes longer is captured alone.
    """

    def __init__(self, call: Call, positions: int, device: str) -> None:
        self._call = call
        self._positions = positions
        self._device = torch.device(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 1
        self._other: torch.Tensor | None = None
        if positions >= MOST_CALLS:
            cache_bytes = torch.cuda.get_device_properties(self._device).L2_cache_size
            self._other = torch.ones(2 * cache_bytes // 4, device=self._device)

    def start(self) -> None:
        """Capture, and replay once.

        Raises:
            RuntimeError: The candidate does something that a CUDA graph cannot hold.
        """
        with torch.cuda.device(self._device):
            with _side_stream():
                for position in range(min(_WARM_UP_CALLS, self._positions)):
                    self._call(position)
            torch.cuda.synchronize()
            self._calls = self._count(self._capture(1))
            if self._calls > 1:
                self._capture(self._calls)
            self.sample()

    def go_to(self, share: float) -> None:
        """Do nothing: each replay passes through the whole rotation."""

    def sample(self) -> float:
        assert self._graph is not None
        with torch.cuda.device(self._device):
            start, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            if self._other is not None:
                self._other.sum()  # read, as what is written has to leave the cache later
            start.record()
            self._graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / self._calls

    def _capture(self, calls: int) -> float:
        """Capture `calls` calls; return microseconds of one of them in a replay."""
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
        return max(self._positions, min(rounds * self._positions, MOST_CALLS))


class GraphedStep:
    """A step, captured when it is first called with arguments of some shapes.

    Args:
        step, state, pool: As for `Backend.graphed`. The tensors of `state` are put back after the
            calls that warm the step up.
    """

    def __init__(
        self,
        step: Callable[..., torch.Tensor],
        state: Callable[[], Sequence[torch.Tensor]],
        pool: Any = None,
    ) -> None:
        self._step = step
        self._state = state
        self._pool = pool
        self._graphs: dict[
            tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]
        ] = {}

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        shapes = tuple(argument.shape for argument in arguments)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture([argument.clone() for argument in arguments])
        graph, inputs, output = self._graphs[shapes]
        for mine, given in zip(inputs, arguments, strict=True):
            mine.copy_(given)
        graph.replay()
        return output

    def _capture(
        self, inputs: list[torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]:
        before = [tensor.clone() for tensor in self._state()]
        # Warming up must not use up random numbers: a seed then gives the same ones in every call.
        with torch.random.fork_rng(devices=[torch.cuda.current_device()]), _side_stream():
            for _ in range(_WARM_UP_CALLS):  # the first one compiles
                self._step(*inputs)
                self._put_back(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._step(*inputs)
        return graph, inputs, output

    def _put_back(self, before: Sequence[torch.Tensor]) -> None:
        for tensor, value in zip(self._state(), before, strict=True):
            tensor.copy_(value)


@contextmanager
def _side_stream() -> Iterator[None]:
    """Run on another stream, as calls must before they are captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
