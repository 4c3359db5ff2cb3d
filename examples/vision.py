"""A vision transformer that tells four shapes apart in noise.

It is trained in seconds, then searched with a loss of its own.

python vision.py vision.pt
autoquant search vision.pt --model-factory vision:make --sample-inputs vision:inputs
    --quality vision:loss --db vision.db
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

SIZE, SHAPES = 32, 4  # pixels; circle, square, triangle, cross
SEEDS = {"calibration": 1, "selection": 2, "report": 3}
IMAGES = 96  # in each part
TRAINING_SEED, BATCH = 1000, 32


def make() -> nn.Module:
    """The model without its weights: what `--model-factory` names."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=SHAPES,
    )
    return ViTForImageClassification(config).eval()


def inputs() -> tuple[torch.Tensor]:
    """The arguments of one forward pass, whose time is what is optimised: eight images."""
    return (images(8, seed=0)[0],)


def loss(module: nn.Module, part: str) -> torch.Tensor:
    """Cross-entropy of each image of a part, in nats."""
    pixels, labels = images(IMAGES, SEEDS[part])
    logits = module(pixels.to(next(module.parameters()).dtype)).logits
    return F.cross_entropy(logits.float(), labels, reduction="none")


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images `[count, 1, SIZE, SIZE]` of one shape each, and the shapes `[count]`."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(SHAPES, (count,), generator=draw)
    radius = 5 + 4 * torch.rand(count, 1, 1, generator=draw)
    center = 10 + (SIZE - 20) * torch.rand(2, count, 1, 1, generator=draw)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    y, x = rows - center[0], columns - center[1]
    outlines = torch.stack(
        [
            x.square() + y.square() < radius.square(),
            (x.abs() < radius * 0.9) & (y.abs() < radius * 0.9),
            (y.abs() < radius) & (x.abs() < (y + radius) / 2),
            ((x.abs() < radius / 3) & (y.abs() < radius))
            | ((y.abs() < radius / 3) & (x.abs() < radius)),
        ]
    )
    drawn = outlines[labels, torch.arange(count)].float()
    return (drawn + 0.3 * torch.randn(count, SIZE, SIZE, generator=draw)).unsqueeze(1), labels


def train(steps: int) -> nn.Module:
    """Return a model trained on `steps` batches, none of which it is judged by."""
    torch.manual_seed(0)
    module = make().train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for step in range(steps):
        pixels, labels = images(BATCH, TRAINING_SEED + step)
        optimizer.zero_grad()
        F.cross_entropy(module(pixels).logits, labels).backward()
        optimizer.step()
    return module.eval()


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="file for the weights, .pt")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    module = train(arguments.steps)
    torch.save(module.state_dict(), arguments.out)
    with torch.no_grad():
        pixels, labels = images(IMAGES, SEEDS["report"])
        accuracy = (module(pixels).logits.argmax(dim=1) == labels).float().mean().item()
    print(f"{arguments.out}: {accuracy:.0%} of the report part right")


if __name__ == "__main__":
    main()
