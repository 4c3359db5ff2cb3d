"""How many warps and tiles a block of the project's int4 product should have, for the linears of
Llama-3-8B.

    python studies/gpu_linears/own_kernels/int4_settings.py OUT [--group 128]

Every setting is compiled, checked against the float32 product, and timed: weights cold, many calls
in one CUDA graph. Beside the fastest settings stand what the package picks, and the time it takes
to read the weight at the memory's measured bandwidth. OUT gets `int4_settings.jsonl`, a line for
each size and number of rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch

from autoquant.candidates import get_format
from autoquant.candidates.formats.int4_tiled import SETTINGS, Int4TiledTensor, int4_unpack
from autoquant.candidates.kernels.cuda_source import CudaKernel
from autoquant.candidates.kernels.few_rows import Setting, setting_of
from autoquant.devices.cuda_graphs import GraphClock
from autoquant.errors import CandidateError
from autoquant.profiler.roofline import measure_roofline

SIZES = (
    (1024, 4096),
    (4096, 4096),
    (6144, 4096),
    (14336, 4096),
    (28672, 4096),
    (4096, 14336),
    (128256, 4096),
)
ROWS = (1, 4, 8, 16)
COLD_BYTES = 150e6
SAMPLES = 5


def settings() -> list[Setting]:
    """Warps and tiles of a block, blocks of a multiprocessor."""
    every = itertools.product((4, 8, 16), (1, 2, 4), (1, 2, 3, 4, 6, 8))
    return [(warps, tiles, blocks) for warps, tiles, blocks in every if 12 <= warps * blocks <= 32]


def latency_us(call: Callable[[int], object], copies: int) -> float:
    """Median of one call, the copies of the weight in turn."""
    clock = GraphClock(call, copies, "cuda")
    clock.start()
    return sorted(clock.sample() for _ in range(SAMPLES))[SAMPLES // 2]


def launcher(  # noqa: ANN201
    kernel: CudaKernel,
    setting: Setting,
    weights: list[Int4TiledTensor],
    x: torch.Tensor,
    y: torch.Tensor,
):
    (warps, tiles, _), (n, k) = setting, weights[0].shape
    return lambda copy: kernel.launch(
        -(-n // (16 * tiles)),
        32 * warps,
        x,
        weights[copy].qdata,
        weights[copy].scale_and_zero,
        None,
        y,
        len(x),
        n,
        k,
    )


def measure(
    n: int, k: int, m: int, group: int, weights: list[Int4TiledTensor]
) -> dict[str, object]:
    """All settings at one size."""
    x = torch.randn(m, k, device="cuda").bfloat16()
    y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    expected = x.float() @ weights[0].unpack(torch.float32).t()
    times: dict[Setting, float] = {}
    for setting in settings():
        warps, tiles, blocks = setting
        defines = {
            "GROUP": group,
            "WARPS": warps,
            "TILES": tiles,
            "BLOCKS": blocks,
            "EIGHTS": -(-m // 8),
        }
        try:
            kernel = CudaKernel("int4_tiled.cu", "int4_rows", tuple(defines.items()), x.device)
        except CandidateError:
            continue  # more shared memory than a block may have
        call = launcher(kernel, setting, weights, x, y)
        call(0)
        assert ((y.float() - expected).norm() / expected.norm()).item() < 0.003
        times[setting] = latency_us(call, len(weights))
    picked = setting_of(SETTINGS, n, m, torch.cuda.get_device_properties(0).multi_processor_count)
    fastest = sorted(times, key=times.__getitem__)[:3]
    return {"n": n, "k": k, "m": m, "group": group, "picked": picked,
        "picked_us": round(times[picked], 2),
            "fastest": {str(setting): round(times[setting], 2) for setting in fastest}}  # fmt: skip


def unpacking(weights: list[Int4TiledTensor]) -> dict[str, float]:
    """Microseconds to write the weight out."""
    calls = {
        name: latency_us(
            lambda copy, float8=float8: int4_unpack(*parts(weights[copy]), float8), len(weights)
        )
        for name, float8 in (("unpack_bfloat16_us", False), ("unpack_float8_us", True))
    }
    return {name: round(value, 1) for name, value in calls.items()}


def parts(weight: Int4TiledTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return weight.qdata, weight.scale_and_zero, weight.row_scale


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--group", type=int, default=128)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    bandwidth = measure_roofline("cuda").bandwidth_bytes_per_s
    fmt = get_format(f"int4-g{arguments.group}/tiled")
    for n, k in SIZES:
        copies = max(2, int(2 * COLD_BYTES / (n * k)))
        weights = [fmt.store(torch.randn(n, k, device="cuda").bfloat16()) for _ in range(copies)]
        read_bytes = sum(part.nbytes for part in parts(weights[0])[:2])
        more = {
            "read_us": round(read_bytes / bandwidth * 1e6, 2),
            **(unpacking(weights) if n < 100_000 else {}),
        }
        for m in ROWS:
            row = measure(n, k, m, arguments.group, weights) | more
            print(json.dumps(row), flush=True)
            with (arguments.out / "int4_settings.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
