"""Unquantized attentions as autoquant loads them, against PyTorch's own, in turn.

    python studies/models/linears/attention.py [ROUNDS]

On one thread, by processor time. Prints the ratio of times, loaded to PyTorch's own, of the median round and the middle half of all.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from autoquant.models.load import from_module

WIDTH, HEADS, BATCH, TOKENS = 512, 8, 4, 128


class Crossed(nn.Module):
    """An attention to other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.attention(x, y, y, need_weights=False)[0]


def kinds() -> dict[str, tuple[nn.Module, int]]:
    """Return modules with the number of their inputs."""
    shape = (WIDTH, HEADS, 4 * WIDTH)
    encoder = nn.TransformerEncoderLayer(*shape, batch_first=True)
    decoder = nn.TransformerDecoderLayer(*shape, batch_first=True)
    return {
        "encoder layer": (nn.TransformerEncoder(encoder, 2), 1),
        "encoder layer, norm first": (
            nn.TransformerEncoderLayer(*shape, batch_first=True, norm_first=True),
            1,
        ),
        "decoder layer": (decoder, 2),
        "attention to other tokens": (Crossed(), 2),
    }


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one of three calls."""
    started = time.process_time()
    for _ in range(3):
        run()
    return (time.process_time() - started) / 3


@torch.no_grad()
def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for name, (module, count) in kinds().items():
            own = module.to(dtype).eval().requires_grad_(False)
            inputs = [torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype) for _ in range(count)]
            ours = from_module(copy.deepcopy(own), sample_inputs=tuple(inputs)).module
            for compiled in (False, True):
                pair = [
                    torch.compile(part, dynamic=False) if compiled else part for part in (own, ours)
                ]
                for part in pair:
                    part(*inputs)
                ratios = []
                for _ in range(rounds):
                    theirs, mine = (seconds(partial(part, *inputs)) for part in pair)
                    ratios.append(mine / theirs)
                low, middle, high = statistics.quantiles(ratios, n=4)
                how = "compiled" if compiled else "eager"
                words = f"{middle:.3f} (half of all: {low:.3f} to {high:.3f})"
                print(f"{name}, {str(dtype).removeprefix('torch.')}, {how}: {words}", flush=True)


if __name__ == "__main__":
    main()
