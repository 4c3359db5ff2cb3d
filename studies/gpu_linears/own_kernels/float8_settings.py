"""How many warps and tiles a block of the project's float8 product should have, for the linears of
Llama-3-8B.

    python studies/gpu_linears/own_kernels/float8_settings.py OUT

As `int4_settings.py`; beside the fastest settings stands gemlite's product of the same weight. OUT
gets `float8_settings.jsonl`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from int4_settings import COLD_BYTES, ROWS, SIZES, latency_us, settings
from torchao.quantization import Float8Tensor

from autoquant.candidates import get_format
from autoquant.candidates.kernels.cuda_source import CudaKernel
from autoquant.candidates.kernels.few_rows import Setting, setting_of
from autoquant.candidates.kernels.float8_rows import SETTINGS
from autoquant.candidates.kernels.gemlite import GEMLITE, linear_w8
from autoquant.errors import CandidateError
from autoquant.profiler.roofline import measure_roofline

TUNING_THREADS = 8


def measure(n: int, k: int, m: int, weights: list[Float8Tensor]) -> dict[str, object]:
    """All settings at one size."""
    x = torch.randn(m, k, device="cuda").bfloat16()
    y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    expected = x.float() @ (weights[0].qdata.float() * weights[0].scale).t()
    times: dict[Setting, float] = {}
    for warps, tiles, blocks in settings():
        defines = {"WARPS": warps, "TILES": tiles, "BLOCKS": blocks, "EIGHTS": -(-m // 8)}
        try:
            kernel = CudaKernel("float8_rows.cu", "float8_rows", tuple(defines.items()), x.device)
        except CandidateError:
            continue  # more shared memory than a block may have

        def call(
            copy: int, kernel: CudaKernel = kernel, warps: int = warps, tiles: int = tiles
        ) -> None:
            values, scale = weights[copy].qdata, weights[copy].scale
            kernel.launch(-(-n // (16 * tiles)), 32 * warps, x, values, scale, None, y, m, n, k)

        call(0)
        assert ((y.float() - expected).norm() / expected.norm()).item() < 0.003
        times[warps, tiles, blocks] = latency_us(call, len(weights))
    gemlite_us = latency_us(
        lambda copy: linear_w8(x, weights[copy].qdata, weights[copy].scale, None, dynamic=False),
        len(weights),
    )
    picked = setting_of(SETTINGS, n, m, torch.cuda.get_device_properties(0).multi_processor_count)
    fastest = sorted(times, key=times.__getitem__)[:3]
    return {"n": n, "k": k, "m": m, "picked": picked, "picked_us": round(times[picked], 2),
        "gemlite_us": round(gemlite_us, 2),
            "fastest": {str(setting): round(times[setting], 2) for setting in fastest}}  # fmt: skip


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    GEMLITE.tune_alone(TUNING_THREADS)
    bandwidth = measure_roofline("cuda").bandwidth_bytes_per_s
    fmt = get_format("float8-row/plain")
    for n, k in SIZES:
        copies = max(2, int(COLD_BYTES / (n * k)))
        weights = [fmt.store(torch.randn(n, k, device="cuda").bfloat16()) for _ in range(copies)]
        for m in ROWS:
            row = measure(n, k, m, weights) | {"read_us": round(n * k / bandwidth * 1e6, 2)}
            print(json.dumps(row), flush=True)
            with (out / "float8_settings.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
