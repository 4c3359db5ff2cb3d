"""Times `kernels.py` over tile shapes for one row: python sweep.py > results.jsonl. Needs a CUDA
GPU and triton.

One line per matrix and kernel: n, k, kernel, and [microseconds, [rows, columns or chunks, warps,
inline PTX]], fastest first.
"""

from __future__ import annotations

import itertools
import json

import kernels
import torch
import triton

from autoquant.devices.cuda_graphs import GraphClock

MATRICES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
COLD_BYTES = 130 << 20
GROUP = 128
SAMPLES = 4


def settings(kind: str) -> list[tuple[int, int, int, bool]]:
    """Tiles of which each thread holds a reasonable number of bytes."""
    if kind == "w8":
        tiles = itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (1, 2, 4, 8), (False,))
        return [t for t in tiles if 16 <= t[0] * t[1] / (32 * t[2]) <= 64]
    tiles = itertools.product((1, 2, 4, 8, 16), (8, 16, 32, 64, 128), (1, 2, 4, 8), (True, False))
    return [t for t in tiles if 16 <= t[0] * t[1] * 16 / (32 * t[2]) <= 128]


def weight(kind: str, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random values and scales."""
    if kind == "w8":
        values = torch.randint(0x38, 0x3E, (n, k), dtype=torch.uint8, device="cuda").view(
            torch.float8_e4m3fn
        )
        return values, torch.rand(n, device="cuda")
    words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32, device="cuda")
    return words, torch.rand(n, k // GROUP, 2, device="cuda").bfloat16().view(torch.int32)


def time_us(kind: str, n: int, k: int, setting: tuple[int, int, int, bool]) -> float:
    """Microseconds of one product with cold weights."""
    rows, columns, warps, asm = setting
    copies = [
        weight(kind, n, k) for _ in range(-(-COLD_BYTES // (n * k if kind == "w8" else n * k // 2)))
    ]
    x = torch.randn(1, k, device="cuda").bfloat16()
    y = torch.empty(1, n, device="cuda").bfloat16()
    grid = (triton.cdiv(n, rows),)

    def call(i: int) -> None:
        values, scales = copies[i]
        common = {"HAS_BIAS": False, "EVEN_N": n % rows == 0, "BLOCK_N": rows, "num_warps": warps}
        if kind == "w8":
            kernels.gemv_w8[grid](
                x,
                values,
                scales,
                None,
                y,
                n,
                k,
                PER_ROW=True,
                EVEN_K=k % columns == 0,
                BLOCK_K=columns,
                **common,
            )
        else:
            even = (k // 32) % columns == 0
            kernels.gemv_w4[grid](
                x,
                values,
                scales,
                None,
                y,
                n,
                k,
                GROUP=GROUP,
                EVEN_K=even,
                BLOCK_C=columns,
                ASM=asm,
                **common,
            )

    clock = GraphClock(call, len(copies), "cuda")
    clock.start()
    return sorted(clock.sample() for _ in range(SAMPLES))[SAMPLES // 2]


def main() -> None:
    """Print one JSON line per matrix and kernel."""
    for (n, k), kind in itertools.product(MATRICES, ("w4", "w8")):
        timed = sorted(
            (round(time_us(kind, n, k, setting), 2), setting) for setting in settings(kind)
        )
        print(json.dumps([n, k, kind, timed]), flush=True)


if __name__ == "__main__":
    main()
