"""Measure what a table and the head tied to it take and lose, by pairs of formats.

    python studies/models/embeddings/pairs.py MODEL [WINDOWS]

All other linears are in int8 by rows. Windows of 512 tokens are of the text that autoquant ships.
Products run by `dequantize-matmul` and `unpack-matmul`, which round no activation.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence

import torch

from autoquant.delivery.applier import applied, module_bytes
from autoquant.evaluators.quality import next_token_logits
from autoquant.evaluators.text import DEFAULT_TEXT
from autoquant.events import ignore
from autoquant.models import LoadedModel, load_model
from autoquant.profiler.record import record_model
from autoquant.records import LayerChoice, Plan, Prediction, RouteStep, Site, Workload

KERNELS = {"bfloat16/plain": "matmul", "int8-row/plain": "dequantize-matmul"}
KERNELS |= dict.fromkeys(("int4-g32/lanes", "int4-g64/lanes"), "unpack-matmul")
PAIRS = (
    ("bfloat16/plain", "bfloat16/plain"),
    ("int8-row/plain", "bfloat16/plain"),
    ("int8-row/plain", "int8-row/plain"),
    ("int4-g32/lanes", "int8-row/plain"),
    ("int4-g32/lanes", "int4-g32/lanes"),
)
TOKENS = 512


def choice(site: Site, fmt: str) -> LayerChoice:
    return LayerChoice(
        name=site.name,
        parameters=site.parameters,
        shape=site.shape,
        format=fmt,
        route=(RouteStep(upper_m=None, kernel="lookup" if site.lookup else KERNELS[fmt]),),
        numerics=f"{fmt.partition('/')[0]}+a16",
        latency_us={},
        memory_bytes=0,
        loss=0.0,
        tied=site.tied,
    )


def plan_of(loaded: LoadedModel, sites: Sequence[Site], head: str, table: str) -> Plan:
    """The plan with a head and a table in these formats."""
    (found,) = (site for site in sites if site.lookup)
    formats = {found.name: table, found.tied: head}
    layers = tuple(choice(site, formats.get(site.name, "int8-row/plain")) for site in sites)
    return Plan(
        plan_id="pairs",
        study_id="pairs",
        label=f"{head}, {table}",
        kind="uniform",
        model_hash=loaded.content_hash,
        dtype=loaded.dtype,
        layers=layers,
        prediction=Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=0),
    )


@torch.no_grad()
def losses(module: torch.nn.Module, windows: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood of each window."""
    return [
        torch.nn.functional.cross_entropy(
            next_token_logits(module, ids[None]).float()[:-1], ids[1:]
        ).item()
        for ids in windows
    ]


def main(folder: str, count: int = 8) -> None:
    loaded = load_model(folder, device="cpu")
    sites = record_model(loaded, Workload.parse("prefill=8,decode=2"), ignore, tables=True).layers
    ids = loaded.tokenizer(DEFAULT_TEXT.read_text(), return_tensors="pt")["input_ids"][0]
    windows = ids[: count * TOKENS].reshape(-1, TOKENS)
    before = losses(loaded.module, windows)
    print(f"{folder}: {module_bytes(loaded.module) / 2**20:.1f} MiB, {len(windows)} windows")
    print(f"{'head':16} {'table':16} {'MiB':>7} {'perplexity':>11} {'+-':>6}", flush=True)
    for pair in PAIRS:
        module = applied(plan_of(loaded, sites, *pair), loaded.module, None)
        more = [after - own for after, own in zip(losses(module, windows), before, strict=True)]
        spread = statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else 0.0
        size = module_bytes(module) / 2**20
        print(
            f"{pair[0]:16} {pair[1]:16} {size:7.1f} {math.expm1(statistics.mean(more)):+11.2%}"
            f" {spread:6.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
