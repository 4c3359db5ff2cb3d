"""Time attention for one token by the settings of its kernel, over numbers and over codes.

    python studies/models/kv_cache/settings.py [BATCH [LENGTH]]

16 query heads share 8 heads of keys, of 128 columns. Each setting is replayed from a CUDA graph.
"""

from __future__ import annotations

import itertools
import statistics
import sys

import torch

from autoquant.records import KV_CACHES
from autoquant.runtime.generate import attention
from autoquant.runtime.generate.kv_codes import codes_of

HEADS, KV_HEADS, WIDTH = 16, 8, 128
BLOCKS, WARPS, PROGRAMS = (64, 128, 256), (4, 8), (2, 3, 4, 6, 8)
CALLS, ROUNDS = 5, 5


def replay_us(run: object) -> float:
    """Return the microseconds of one call, the median of some replays."""
    assert callable(run)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / CALLS)
    return statistics.median(times)


@torch.no_grad()
def main(batch: int = 8, length: int = 32768) -> None:
    """Print the time of each setting, and the fastest of each format."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda").bfloat16()

    q = normal(batch, HEADS, 1, WIDTH)
    k, v = (normal(batch, KV_HEADS, length, WIDTH) for _ in range(2))
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    scale = WIDTH**-0.5
    for kind in (None, *KV_CACHES):
        scales = None
        keys, values, bytes_read = k, v, k.nbytes + v.nbytes
        if kind is not None:
            held = codes_of(k, kind), codes_of(v, kind)
            keys, values = (each.codes for each in held)
            scales = (held[0].scales, held[1].scales)
            bytes_read = 2 * (keys.nbytes + scales[0].nbytes)
            if kind == "float8":
                keys, values = (each.view(torch.float8_e4m3fn) for each in (keys, values))
        found = {}
        for block, warps in itertools.product(BLOCKS, WARPS):
            for programs in PROGRAMS:
                attention._BLOCK_BYTES, attention._MOST_BLOCK = 1 << 30, block
                attention._WARPS = warps
                attention._PROGRAMS_OF_A_PROCESSOR = programs
                attention._PROGRAMS_OVER_FLOAT8 = programs
                try:
                    us = replay_us(
                        lambda a=keys, b=values, c=scales: attention._launch(
                            q, a, b, mask, scale, processors, c
                        )
                    )
                except Exception as error:  # noqa: BLE001 - too much shared memory, say
                    print(kind, block, warps, f"{type(error).__name__}", flush=True)
                    break
                found[block, warps, programs] = us
            best = min((us, key) for key, us in found.items() if key[:2] == (block, warps))
            print(
                f"{kind}: block {block}, warps {warps}: {best[0]:.0f} us, programs {best[1][2]}",
                flush=True,
            )
        (us, key) = min((us, key) for key, us in found.items())
        speed = bytes_read / us * 1e-6
        print(
            f"{kind}: best {us:.0f} us by block, warps, programs {key}: {speed:.2f} TB/s",
            flush=True,
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
