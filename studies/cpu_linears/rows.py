"""The project's own CPU products beside the library's, at the linears of three models.

    OMP_NUM_THREADS=2 python studies/cpu_linears/rows.py OUT.jsonl

Kernels take turns, and each call reads other copies of the weight, 256 MB in all, so that it comes
from memory or the last cache, as in a step of a model. A line is one shape and one number of rows:
microseconds of each kernel's fastest round, and the share of the bandwidth that reading alone
reaches.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from autoquant.candidates import get_format
from autoquant.candidates.flat import stored_bytes
from autoquant.records import LinearShape

SHAPES = {
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)],
    "Qwen2.5-0.5B": [(896, 896), (128, 896), (4864, 896), (896, 4864)],
    "wiki28m": [(512, 512), (1376, 512), (512, 1376), (4096, 512)],
}
ROWS = (1, 4, 16, 32, 128, 512)
KERNELS = (
    ("bfloat16/plain", "matmul"),
    ("bfloat16/routed", "cpu-rows"),
    ("int8-row/plain", "int8pack-mm"),
    ("int8-row/plain", "cpu-rows"),
    ("int8-row/plain", "cpu-tiles"),
    ("int4-g32/cpu-packed", "int4pack-mm"),
    ("int4-g32/lanes", "cpu-rows"),
    ("int4-g32/lanes", "cpu-tiles"),
    ("int4-g32/lanes", "unpack-matmul"),
)
COLD_BYTES, ROUNDS, ROUND_S, MOST_COPIES = 256e6, 5, 0.03, 200
Call = Callable[[int], object]


def round_us(call: Call, copies: int) -> float:
    """The mean of as many calls as fit into a round, one copy of the weight after the other."""
    start, calls = time.perf_counter(), 0
    while True:
        for copy in range(copies):
            call(copy)
        calls += copies
        took_s = time.perf_counter() - start
        if took_s > ROUND_S:
            return took_s / calls * 1e6


def reading_bytes_per_s() -> float:
    """Bytes that all threads read in a second from 256 MB."""
    numbers = torch.ones(int(COLD_BYTES / 8), dtype=torch.int64)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return numbers.nbytes / min(times)


def measure(n: int, k: int, m: int) -> dict[str, object]:
    x = torch.randn(m, k).bfloat16()
    weight = torch.randn(n, k).bfloat16()
    shape = LinearShape(n=n, k=k, bias=False, dtype="bfloat16")
    calls: dict[str, tuple[Call, int, int]] = {}
    for format_id, kernel_id in KERNELS:
        fmt = get_format(format_id)
        kernel = fmt.kernel(kernel_id)
        if fmt.unsupported_reason(kernel, shape, m, "cpu"):
            continue
        stored = fmt.store(weight)
        bytes_ = stored_bytes(stored)
        copies = max(2, min(MOST_COPIES, int(COLD_BYTES / bytes_)))
        weights = [stored, *(stored.clone() for _ in range(copies - 1))]

        def call(
            copy: int,
            linear: Callable[..., object] = kernel.linear,
            weights: list[torch.Tensor] = weights,
        ) -> object:
            return linear(x, weights[copy], None)

        calls[f"{format_id}/{kernel_id}"] = call, copies, bytes_
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (call, copies, _) in calls.items():
            times[name].append(round_us(call, copies))
    bandwidth = reading_bytes_per_s()
    return {
        "n": n,
        "k": k,
        "m": m,
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "latency_us": {name: round(min(all_us), 1) for name, all_us in times.items()},
        "median_us": {name: round(statistics.median(us), 1) for name, us in times.items()},
        "share_of_bandwidth": {
            name: round(calls[name][2] / min(all_us) * 1e6 / bandwidth, 2)
            for name, all_us in times.items()
        },
    }


def main() -> None:
    with Path(sys.argv[1]).open("w") as file, torch.inference_mode():
        for model, shapes in SHAPES.items():
            for n, k in shapes:
                for m in ROWS:
                    row = {"model": model} | measure(n, k, m)
                    print(json.dumps(row), flush=True)
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
