"""An encoder that says which of two words a sequence has more of.

It is trained in seconds, then searched with a loss of its own.

python encoder.py encoder.pt
autoquant search encoder.pt --model-factory encoder:make --sample-inputs encoder:inputs
    --quality encoder:loss --db encoder.db
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

WORDS, LENGTH = 64, 32
FIRST, SECOND = 1, 2  # the two words that are counted
WRONG_LABELS = 0.1  # so that no model is perfect, and its loss not zero
SEEDS = {"calibration": 1, "selection": 2, "report": 3}
SEQUENCES = 128  # in each part
TRAINING_SEED, BATCH = 1000, 32


def make() -> nn.Module:
    """The model without its weights: what `--model-factory` names."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    return BertForSequenceClassification(config).eval()


def inputs() -> dict[str, torch.Tensor]:
    """The arguments of one forward pass, whose time is what is optimised: four sequences."""
    words, _ = sequences(4, seed=0)
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def loss(module: nn.Module, part: str) -> torch.Tensor:
    """Cross-entropy of each sequence of a part, in nats."""
    words, labels = sequences(SEQUENCES, SEEDS[part])
    logits = module(input_ids=words, attention_mask=torch.ones_like(words)).logits
    return F.cross_entropy(logits.float(), labels, reduction="none")


def sequences(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return word ids `[count, LENGTH]` and labels `[count]`, 1 if the second word is the more
    frequent one.
    """
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(3, WORDS, (count, LENGTH), generator=draw)
    counted = torch.rand(count, LENGTH, generator=draw) < 0.4
    which = torch.randint(FIRST, SECOND + 1, (count, LENGTH), generator=draw)
    words = torch.where(counted, which, words)
    labels = ((words == SECOND).sum(dim=1) > (words == FIRST).sum(dim=1)).long()
    wrong = torch.rand(count, generator=draw) < WRONG_LABELS
    return words, torch.where(wrong, 1 - labels, labels)


def train(steps: int) -> nn.Module:
    """Return a model trained on `steps` batches, none of which it is judged by."""
    torch.manual_seed(0)
    module = make().train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for step in range(steps):
        words, labels = sequences(BATCH, TRAINING_SEED + step)
        optimizer.zero_grad()
        F.cross_entropy(module(input_ids=words).logits, labels).backward()
        optimizer.step()
    return module.eval()


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="file for the weights, .pt")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    module = train(arguments.steps)
    torch.save(module.state_dict(), arguments.out)
    with torch.no_grad():
        words, labels = sequences(SEQUENCES, SEEDS["report"])
        accuracy = (module(input_ids=words).logits.argmax(dim=1) == labels).float().mean().item()
    print(f"{arguments.out}: {accuracy:.0%} of the report part right")


if __name__ == "__main__":
    main()
