"""A convolution of one point as a linear with the channels last, against itself, in turn.

    python studies/models/linears/convolutions.py [ROUNDS]

On one thread, by processor time. Prints the median ratio of times, linear to convolution.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from autoquant.candidates.calls import LinearHook
from autoquant.models.pointwise import show_pointwise

BATCH = 4
SIZES = ((256, 28), (512, 14), (1024, 7))


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of a call."""
    started = time.process_time()
    run()
    return time.process_time() - started


@torch.no_grad()
def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 25
    torch.set_num_threads(1)
    for channels, side in SIZES:
        for layout in (torch.contiguous_format, torch.channels_last):
            own = nn.Sequential(nn.Conv2d(channels, channels, 1)).to(memory_format=layout)
            x = torch.randn(BATCH, channels, side, side).to(memory_format=layout)
            ours = copy.deepcopy(own)
            show_pointwise(ours, ["0"])

            def watched(part: nn.Module = ours, x: torch.Tensor = x) -> None:
                with LinearHook():
                    part(x)

            def plain(part: nn.Module = own, x: torch.Tensor = x) -> None:
                part(x)

            ratios = [seconds(watched) / seconds(plain) for _ in range(rounds)]
            place = "last" if layout is torch.channels_last else "first"
            points = f"{channels} channels, {side} x {side} points, channels {place}"
            print(f"{points}: {statistics.median(ratios):.2f}", flush=True)


if __name__ == "__main__":
    main()
