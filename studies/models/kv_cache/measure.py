"""Time a decode step at long context with keys and values in each format, and score the format.

    python studies/models/kv_cache/measure.py MODEL --text held.txt --context 32768 --batch 8 \
        --device cuda --json out.json

The steps are those that `generate` replays. All caches are filled with the same random tokens, and
the formats take turns. Perplexity is that of whole windows of the text, whose attention reads keys
and values as the cache gives them back.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoquant.devices import backend
from autoquant.evaluators.contexts import long_windows, losses_with
from autoquant.evaluators.reading import file_pieces
from autoquant.intervals import paired_increase
from autoquant.records import KV_CACHES, KvCache
from autoquant.runtime.generate.decoder import Decoder
from autoquant.runtime.generate.kv_codes import bytes_of_a_sequence, kv_cache_unsupported
from autoquant.runtime.prepare import prepare

ROUNDS = 7
STEPS = 16
"""Of each format in a round."""


def main() -> None:
    """Measure, print as it goes, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16)
    model = prepare(model.to(asked.device).eval().requires_grad_(False))
    kinds: list[KvCache | None] = [None]
    kinds += [kind for kind in KV_CACHES if not kv_cache_unsupported(asked.device, kind)]
    rows = {
        str(kind): {"kv_bytes_of_a_sequence": bytes_of_a_sequence(model, kind, asked.context)}
        for kind in kinds
    }
    time_steps(model, kinds, asked, rows)
    score(model, kinds, asked, rows)
    if asked.json:
        about = {"context": asked.context, "batch": asked.batch, "torch": torch.__version__}
        asked.json.write_text(json.dumps(about | {"formats": rows}, indent=2) + "\n")


@torch.no_grad()
def time_steps(model: Any, kinds: list[KvCache | None], asked: Any, rows: dict[str, Any]) -> None:
    """Fill a cache in each format, and time steps behind it in turn."""
    place = backend(asked.device)
    prompt = asked.context - ROUNDS * STEPS - 16
    ids = torch.randint(
        0,
        model.config.vocab_size,
        (asked.batch, prompt),
        generator=torch.Generator().manual_seed(0),
    ).to(asked.device)
    positions = torch.arange(prompt, device=asked.device).expand(asked.batch, -1)
    decoders, logits = {}, {}
    for kind in kinds:
        before = torch.cuda.memory_allocated() if place.type == "cuda" else 0
        started = time.perf_counter()
        made = decoders[kind] = Decoder(
            model, asked.batch, asked.context, padded=False, kv_cache=kind
        )
        made.start(None)
        made.prompt(ids, positions)
        made.token(ids[:, :1])  # compiles the step
        place.synchronize()
        ready_s = time.perf_counter() - started
        allocated = torch.cuda.memory_allocated() - before if place.type == "cuda" else None
        made.start(None)
        place.synchronize()
        started = time.perf_counter()
        made.prompt(ids, positions)
        place.synchronize()
        prompt_s = time.perf_counter() - started
        logits[kind] = made.token(ids[:, :1]).float().clone()
        off = (logits[kind] - logits[None]).norm() / logits[None].norm()
        rows[str(kind)] |= {
            "ready_s": ready_s,
            "prompt_s": prompt_s,
            "allocated_bytes": allocated,
            "logits_off": off.item(),
            "note": made.note,
        }
        print(kind, rows[str(kind)], flush=True)
    taken: dict[Any, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, made in decoders.items():
            made.token(ids[:, :1])
            place.synchronize()
            started = time.perf_counter()
            for _ in range(STEPS):
                made.token(ids[:, :1])
            place.synchronize()
            taken[kind].append((time.perf_counter() - started) / STEPS * 1e3)
    for kind in kinds:
        rounds = sorted(taken[kind])
        rows[str(kind)] |= {"step_ms": rounds[ROUNDS // 2], "step_ms_of_rounds": taken[kind]}
        ratio = rows["None"]["step_ms"] / rounds[ROUNDS // 2]
        print(
            f"{kind}: {rounds[ROUNDS // 2]:.3f} ms a step ({rounds[0]:.3f} to {rounds[-1]:.3f}), {ratio:.2f}x",
            flush=True,
        )


def score(model: Any, kinds: list[KvCache | None], asked: Any, rows: dict[str, Any]) -> None:
    """Score each format on long windows of the text."""
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    windows = long_windows(file_pieces(asked.text), str(asked.text), tokenizer, asked.context)
    reference: tuple[float, ...] = ()
    for kind in kinds:
        losses = losses_with(model, windows, kind, asked.device)
        reference = reference or losses
        increase = paired_increase(losses, reference, logarithmic=True)
        rows[str(kind)] |= {
            "windows": len(losses),
            "perplexity": math.exp(sum(losses) / len(losses)),
            "increase": [increase.value, increase.low, increase.high],
        }
        print(
            f"{kind}: perplexity {rows[str(kind)]['perplexity']:.5f} on {len(losses)} windows of {asked.context}, {100 * increase.value:+.4f} % ({100 * increase.low:+.4f} to {100 * increase.high:+.4f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
