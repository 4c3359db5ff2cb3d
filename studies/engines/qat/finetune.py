"""Train a language model on for some minutes, with the layers of a plan rounded or not.

usage: finetune.py MODEL TEXT OUT (--seconds N | --steps N) [--qat DIR]
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import autoquant

options = argparse.ArgumentParser()
for name in ("model", "text", "out"):
    options.add_argument(name)
options.add_argument("--qat")
options.add_argument("--seconds", type=float, default=math.inf)
options.add_argument("--steps", type=int, default=1 << 30)
options.add_argument("--batch", type=int, default=4)
options.add_argument("--tokens", type=int, default=256)
options.add_argument("--lr", type=float, default=1e-4)
given = options.parse_args()

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(given.model)
model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
text = Path(given.text).read_text(encoding="utf-8")
ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
print(f"{len(ids)} tokens of text", flush=True)
if given.qat:
    autoquant.prepare_qat(model, given.qat)
model.train()
adam = torch.optim.AdamW(model.parameters(), lr=given.lr, betas=(0.9, 0.95), weight_decay=0.0)
start, step, mean = time.monotonic(), 0, 0.0
while step < given.steps and time.monotonic() - start < given.seconds:
    places = torch.randint(0, len(ids) - given.tokens - 1, (given.batch,))
    rows = torch.stack([ids[place : place + given.tokens + 1] for place in places.tolist()])
    for group in adam.param_groups:
        group["lr"] = given.lr * min(1.0, (step + 1) / 10)
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    step += 1
    mean = loss.item() if step == 1 else 0.95 * mean + 0.05 * loss.item()
    if step % 10 == 0:
        print(f"step {step} loss {mean:.3f} {time.monotonic() - start:.0f} s", flush=True)
print(f"{step} steps of {given.batch * given.tokens} tokens, {time.monotonic() - start:.0f} s")
if given.qat:
    autoquant.finish_qat(model)
model.to(torch.bfloat16).save_pretrained(given.out)
tokenizer.save_pretrained(given.out)
