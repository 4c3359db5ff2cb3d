"""Make a deep model that behaves out of a trained one: repeat its blocks, each with a smaller step.

    python studies/search_cost/deepen.py MODEL OUT --times 8 [--device cuda]

Each block of a Llama comes so many times in a row, and what it adds to the residual stream is
divided by as many. So the deep model takes many short steps where MODEL takes a long one, as a
solver of a differential equation does, and its loss stays near. The head is untied. Prints the loss
of both on a text, in nats a token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

WINDOW = 512
WINDOWS = 16


def main() -> None:
    """Write the deep model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", type=Path, help="to measure the loss on")
    arguments = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    model.to(arguments.device)
    deep = deepened(model, arguments.times)
    if arguments.text:
        text = arguments.text.read_text(encoding="utf-8")[: 40 * WINDOW * WINDOWS]
        ids = tokenizer(text, return_tensors="pt").input_ids[0][: WINDOW * WINDOWS]
        rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).to(arguments.device)
        print(f"loss: {loss(model, rows):.3f} of MODEL, {loss(deep, rows):.3f} of OUT")
    deep.save_pretrained(arguments.out, max_shard_size="5GB")
    tokenizer.save_pretrained(arguments.out)
    parameters = sum(weight.numel() for weight in deep.parameters())
    print(f"{arguments.out}: {deep.config.num_hidden_layers} blocks, {parameters:,} parameters")


def deepened(model: Any, times: int) -> LlamaForCausalLM:
    """Return a model with each block of `model` repeated, on its device and in its dtype."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_hidden_layers *= times
    config.tie_word_embeddings = False
    with torch.device("meta"):
        deep = LlamaForCausalLM(config).to(model.dtype)
    deep.to_empty(device=model.device)
    deep.model.rotary_emb = model.model.rotary_emb
    own = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in deep.named_parameters():
            weight.copy_(own[original_name(name, times)])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(times)
    return deep.eval()


def original_name(name: str, times: int) -> str:
    """Return the name of the parameter that a deep model's is made of."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        parts[2] = str(int(parts[2]) // times)
    return ".".join(parts)


@torch.no_grad()
def loss(model: Any, rows: torch.Tensor) -> float:
    """Return the mean loss in nats a token over windows `[rows, tokens]`."""
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
