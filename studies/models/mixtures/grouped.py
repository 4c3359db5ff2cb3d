"""Time products of experts on a GPU, all at once, beside those of unquantized experts.

    python grouped.py

Each is replayed from a CUDA graph, in turn with the others; weights are larger than the cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from autoquant.candidates import get_format
from autoquant.candidates.experts import ExpertsWeight, multiply_experts
from autoquant.records import RouteStep

SIZES = [(8, 28672, 4096), (8, 4096, 14336), (8, 4096, 768), (128, 1536, 2048)]
ROWS_EACH = [1, 4, 16, 128]
KERNELS = [
    ("int4-g128/tiled", "rows"),
    ("int4-g32/tiled", "rows"),
    ("float8-row/plain", "rows"),
    ("int4-g128/tiled", "unpack-matmul"),
    ("int4-g128/tiled", "unpack-scaled-mm"),
    ("float8-row/plain", "scaled-mm"),
]
ROUNDS, CALLS = 7, 20


def replayed(run: Callable[[], object]) -> Callable[[], float]:
    """Return what times a call in microseconds, the mean of some."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()

    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / CALLS

    return sample


def held(weight: torch.Tensor, name: str, kernel: str) -> ExpertsWeight:
    fmt, route = get_format(name), (RouteStep(upper_m=None, kernel=kernel),)
    return ExpertsWeight.of(fmt.store(weight.flatten(0, 1)), fmt, route, weight.dtype, len(weight))


@torch.no_grad()
def measure(experts: int, n: int, k: int, each: int, active: int) -> None:
    """Print the time of each kernel; `active` experts spread over all have `each` rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(experts, n, k, generator=generator, device="cuda").bfloat16()
    x = torch.randn(each * active, k, generator=generator, device="cuda").bfloat16()
    counts = torch.zeros(experts, dtype=torch.int64, device="cuda")
    counts[torch.arange(active, device="cuda") * experts // active] = each
    ends = counts.cumsum(0).to(torch.int32)
    calls = {"bfloat16": lambda: F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)}
    for name, kernel in KERNELS:
        if kernel != "rows" or each <= 16:
            own = held(weight, name, kernel)
            calls[f"{name}/{kernel}"] = lambda own=own: multiply_experts(x, own, ends)
    samples = {name: replayed(run) for name, run in calls.items()}
    found = {name: [] for name in samples}
    for _ in range(ROUNDS):
        for name, sample in samples.items():
            found[name].append(sample())
    plain = statistics.median(found["bfloat16"])
    for name, times in found.items():
        us = statistics.median(times)
        size = f"{active} of {experts} experts {n} x {k}, {each} rows each"
        print(f"{size}: {name} {us:.1f} us, {plain / us:.2f} times", flush=True)


if __name__ == "__main__":
    for experts, n, k in SIZES:
        for each in ROWS_EACH:
            measure(experts, n, k, each, active=experts if each == 128 else experts // 8 + 1)
