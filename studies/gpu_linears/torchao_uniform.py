"""Times torchao's own float8 configurations, compiled as torchao recommends, by the same clock as
autoquant's candidates.

    python torchao_uniform.py --shapes FILE > uniform.csv

A configuration is applied by `quantize_` with its inductor flags (its default), and `F.linear` is
compiled around the weight. Compilation happens in parallel processes first; the process that times
finds its results in the compiler's cache.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import warnings

ROWS = (1, 2048)
CONFIGS = ("weight-only", "dynamic-row", "dynamic-tensor")
COLD_BYTES = 128 << 20
ROUNDS = 12


def config(name: str):  # noqa: ANN201 - torchao's configurations have no common type
    """One of torchao's configurations."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        PerRow,
        PerTensor,
    )

    if name == "weight-only":
        return Float8WeightOnlyConfig()
    granularity = PerRow() if name == "dynamic-row" else PerTensor()
    return Float8DynamicActivationFloat8WeightConfig(granularity=granularity)


def make(name: str, n: int, k: int, m: int, copies: int):  # noqa: ANN201
    """A compiled linear, an input and as many weights as asked for."""
    import torch
    import torch.nn.functional as F
    from torchao.quantization import quantize_

    weights = []
    for seed in range(copies):
        torch.manual_seed(seed)
        linear = torch.nn.Sequential(
            torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="cuda")
        )
        quantize_(linear, config(name))
        weights.append(linear[0].weight.detach())
    x = torch.randn(1, m, k, dtype=torch.bfloat16, device="cuda")
    torch._dynamo.reset()  # or the shapes before would count against the limit of recompilations
    return torch.compile(lambda x, w: F.linear(x, w), dynamic=False, fullgraph=True), x, weights


def compile_one(job: tuple[str, int, int, int]) -> None:
    """Fill the compiler's cache."""
    import torch
    import torch._inductor.config

    warnings.simplefilter("ignore")
    torch._inductor.config.compile_threads = 1
    name, n, k, m = job
    function, x, weights = make(name, n, k, m, 1)
    with torch.no_grad():
        function(x, weights[0])
    torch.cuda.synchronize()


def main() -> None:
    """Print one CSV row per configuration, shape and m."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", required=True)
    arguments = parser.parse_args()
    from autoquant.candidates.kernels.caches import use_kernel_caches
    from autoquant.profiler.shapes import read_shapes

    use_kernel_caches()
    warnings.simplefilter("ignore")
    listed = read_shapes(arguments.shapes, "bfloat16")
    shapes = [shape for shape in listed.names if shape not in listed.rows]
    jobs = [(c, s.n, s.k, m) for c in CONFIGS for s in shapes for m in ROWS]
    with multiprocessing.get_context("spawn").Pool(
        min(len(jobs), (os.cpu_count() or 2) - 1)
    ) as pool:
        pool.map(compile_one, jobs, chunksize=1)

    import torch

    from autoquant.devices.cuda_graphs import GraphClock

    writer = csv.writer(sys.stdout)
    writer.writerow(["config", "n", "k", "m", "latency_us", "spread_us"])
    for name, n, k, m in jobs:
        function, x, weights = make(name, n, k, m, max(1, -(-COLD_BYTES // (n * k))))
        with torch.no_grad():
            clock = GraphClock(
                lambda i, f=function, x=x, w=weights: f(x, w[i]), len(weights), "cuda"
            )
            clock.start()
            samples = sorted(clock.sample() for _ in range(ROUNDS))
        quarter = len(samples) // 4
        spread = samples[-1 - quarter] - samples[quarter]
        writer.writerow([name, n, k, m, round(samples[len(samples) // 2], 2), round(spread, 2)])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
