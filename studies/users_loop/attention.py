"""How long attention for one token takes, by the project's kernels and by PyTorch's, over a cache
that is half full.

    python studies/users_loop/attention.py --out OUT

Heads as in Llama-3-8B: 32 of queries, 8 of keys, 128 columns, bfloat16. Each call reads another
cache, as each layer of a model does, so that none lies in a GPU's own cache. All calls are one CUDA
graph; gaps between kernels are in the times. OUT gets `attention.jsonl`: microseconds a call
(median and the least of rounds in turn) and, for what is seen of the cache, GB/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from autoquant.runtime.generate.attention import token_attention

HEADS, KV_HEADS, WIDTH = 32, 8, 128
BATCHES, LENGTHS, FILLED = (1, 16), (512, 2304, 8192), 0.5
COLD_BYTES = 1 << 30
ROUNDS, WARM_UP = 30, 3

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return token_attention(q, k, v, mask, WIDTH**-0.5)


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As transformers does."""
    k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


WAYS: dict[str, Attend] = {"own": own, "sdpa, enable_gqa": grouped, "sdpa, repeat_kv": repeated}


def captured(
    attend: Attend, q: torch.Tensor, caches: torch.Tensor, mask: torch.Tensor
) -> torch.cuda.CUDAGraph:
    """One call for each cache, each reading what the one before gave."""

    def calls() -> None:
        y = q
        for k, v in caches:
            y = attend(y, k, v, mask)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def measure(batch: int, length: int) -> list[dict[str, object]]:
    """All ways at one size, in turn."""
    seen_bytes = 2 * batch * KV_HEADS * int(length * FILLED) * WIDTH * 2
    count = max(4, min(32, COLD_BYTES // seen_bytes))
    caches = torch.randn(
        count, 2, batch, KV_HEADS, length, WIDTH, device="cuda", dtype=torch.bfloat16
    )
    q = torch.randn(batch, HEADS, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    mask = (torch.arange(length, device="cuda") < int(length * FILLED)).expand(batch, 1, 1, length)
    right = repeated(q.float(), caches[0, 0].float(), caches[0, 1].float(), mask)
    graphs, times = {}, {}
    for name, attend in WAYS.items():
        off = (
            (attend(q, caches[0, 0], caches[0, 1], mask).float() - right).norm() / right.norm()
        ).item()
        assert off < 0.01, f"{name} is off by {off}"
        graphs[name], times[name] = captured(attend, q, caches, mask), []
    for round_number in range(ROUNDS + WARM_UP):
        for name, graph in graphs.items():
            taken = replay_us(graph) / count
            if round_number >= WARM_UP:
                times[name].append(taken)
    return [
        {
            "batch": batch,
            "length": length,
            "way": name,
            "us": round(statistics.median(taken), 2),
            "least_us": round(min(taken), 2),
            "gb_per_s": round(seen_bytes / statistics.median(taken) / 1000),
        }
        for name, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'batch':>5} {'length':>6}  {'way':16} {'us':>8} {'least':>8} {'GB/s':>6}")
    with (out / "attention.jsonl").open("w") as file:
        for batch in BATCHES:
            for length in LENGTHS:
                for row in measure(batch, length):
                    file.write(json.dumps({"device": torch.cuda.get_device_name(), **row}) + "\n")
                    print(
                        "{batch:5} {length:6}  {way:16} {us:8.2f} "
                        "{least_us:8.2f} {gb_per_s:6}".format(**row)
                    )


if __name__ == "__main__":
    main()
