"""Compare greedy text of the replayed loop with that of transformers' own loop, token by token.

    python studies/users_loop/same_text.py MODEL --text text.txt [--device cuda]

MODEL is a Hugging Face folder or one that `autoquant apply` wrote. Where the texts part, it says
how near the two tokens' logits were: a difference of rounding can only decide between tokens that
are nearly as likely.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import autoquant

NEAR = 0.02
"""Of the distance between the best logit and the mean one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new", type=int, default=200)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    model = autoquant.prepare(model.to(options.device).requires_grad_(False))
    ids = tokenizer(options.text.read_text()[:400_000], return_tensors="pt").input_ids[0]
    count, length = options.prompts, options.prompt_tokens
    starts = torch.linspace(0, len(ids) - length - 1, count).long().tolist()
    same, near, first = 0, 0, []
    for start in starts:
        prompt = ids[start : start + length].unsqueeze(0).to(options.device)
        fast, plain = (
            generated(model, prompt, options.new, plain=plain) for plain in (False, True)
        )
        if torch.equal(fast, plain):
            same += 1
            continue
        place = int((fast != plain)[0].int().argmax())
        gap = relative_gap(model, plain[:, :place], int(fast[0, place]), int(plain[0, place]))
        near += gap < NEAR
        first.append((place - length, round(gap, 4)))
    print(f"{options.model}: {same} of {count} texts of {options.new} tokens are the same")
    print(
        f"{near} of the other {count - same} part at a near tie (gap under {NEAR} of the logits' "
        "range)"
    )
    print(f"new token where they part, and gap: {first}")


def generated(model: Any, prompt: torch.Tensor, new: int, *, plain: bool) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = torch.ones_like(prompt)
        settings = {
            "max_new_tokens": new,
            "min_new_tokens": new,
            "do_sample": False,
            "disable_compile": plain,
        }
        found: torch.Tensor = model.generate(prompt, attention_mask=mask, **settings)
    return found


@torch.no_grad()
def relative_gap(model: Any, ids: torch.Tensor, one: int, other: int) -> float:
    """Return how far two tokens' logits are apart, over how far the best is above the mean."""
    logits = model(ids).logits[0, -1].float()
    return float((logits[one] - logits[other]).abs() / (logits.max() - logits.mean()))


if __name__ == "__main__":
    main()
