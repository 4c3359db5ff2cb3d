"""Time `generate` of a saved plan beside transformers' own of the unquantized model, in turn.

python generate.py MODEL SAVED
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM

import autoquant

PROMPT, NEW, ROUNDS = 512, 128, 5


def main(model: str, saved: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    plan = autoquant.load(saved)
    ids = torch.randint(
        plain.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0)
    )
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    took: dict[str, list[float]] = {"transformers": [], "plan": []}
    for number in range(ROUNDS + 1):  # the first one compiles
        for name, each in (("transformers", plain), ("plan", plan)):
            started = time.perf_counter()
            each.generate(ids, **options)
            if number:
                took[name].append(time.perf_counter() - started)
    for name, seconds in took.items():
        print(
            f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        )
    ratios = [a / b for a, b in zip(took["transformers"], took["plan"], strict=True)]
    print(f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
