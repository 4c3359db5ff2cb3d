"""Print perplexities on the first windows of a text, with the formats of a plan and without.

usage: perplexity.py PLAN.DB PLAN_ID TEXT WINDOWS MODEL...
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoquant.candidates import get_format
from autoquant.study.study import Study

database, plan_id, text, windows, *folders = sys.argv[1:]
plan = Study.open(database).plan(plan_id)


@torch.no_grad()
def perplexity(model: nn.Module, rows: torch.Tensor) -> float:
    losses = []
    for row in rows:
        logits = model(input_ids=row[None, :-1], use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits.float(), row[1:]).item())
    return math.exp(sum(losses) / len(losses))


for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    rows = torch.tensor(ids["input_ids"][: int(windows) * 256]).reshape(-1, 256)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.float()  # the numbers of bfloat16, multiplied in float32
    plain = perplexity(model, rows)
    for layer in plan.layers:
        fmt = get_format(layer.format)
        if fmt.values == "bfloat16":
            continue
        weight = model.get_parameter(layer.parameters[0])
        weight.data = fmt.dequantize(fmt.store(weight.data.bfloat16())).float()
    rounded = perplexity(model, rows)
    change = 100 * (rounded / plain - 1)
    print(
        f"{folder}: unquantized {plain:.2f}, with the plan {rounded:.2f} ({change:+.1f} %)",
        flush=True,
    )
