"""Train a mixture of experts on, so that its router and its experts part.

    python train_on.py MIXTURE OUT [SECONDS [BATCH]]

On the text of the demonstration (`demo/corpus.py`), with the loss that balances the router. Weights
are updated in float32, and computed with in bfloat16.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "demo"))
from corpus import documents
from train import encode, learning_rate_share, part_text

CONTEXT, HIGHEST_RATE = 512, 3e-4


def main(source: str, out: str, seconds: float = 40.0, batch: int = 32) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device).train()
    wrapped = AutoTokenizer.from_pretrained(source)
    text = part_text(documents(None), "train")
    tokens = encode(wrapped.backend_tokenizer, text, device)
    weights = list(model.parameters())
    exact = [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(exact, lr=HIGHEST_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator(device).manual_seed(0)
    window = torch.arange(CONTEXT, device=device)
    started, step, took = time.perf_counter(), 0, 0.0
    while took < seconds:
        starts = torch.randint(
            len(tokens) - CONTEXT, (batch, 1), generator=generator, device=device
        )
        rows = tokens[starts + window]
        loss = model(rows, labels=rows, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for kept, weight in zip(exact, weights, strict=True):
            kept.grad, weight.grad = weight.grad.float(), None
        for group in optimizer.param_groups:
            group["lr"] = HIGHEST_RATE * learning_rate_share(took / seconds)
        optimizer.step()
        with torch.no_grad():
            for kept, weight in zip(exact, weights, strict=True):
                weight.copy_(kept)
        if step % 50 == 0:
            print(f"{took:5.1f} s  step {step}  loss {loss.item():.4f}", flush=True)
        step, took = step + 1, time.perf_counter() - started
    model.eval().save_pretrained(out)
    wrapped.save_pretrained(out)
    print(f"{step} steps of {batch} x {CONTEXT} tokens, the last loss {loss.item():.4f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:4]), *map(int, sys.argv[4:5]))
