"""Measure what checking the kernels adds to loading: as many layers as an 8B model has, and its shapes.

    python studies/reliability/check_cost.py FOLDER

Seconds are CPU time of this process, so that other programs do not count.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.linears import take_apart
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery import checkpoint
from autoquant.delivery.kernel_check import check_kernels
from autoquant.records import RouteStep

LAYERS = 32
SHAPES = (
    (4096, 4096),
    (1024, 4096),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (14336, 4096),
    (4096, 14336),
)
KERNELS = {"int8-row/plain": ("int8pack-mm", "int-mm"), "int4-g64/cpu-packed": ("int4pack-mm",) * 2}


class Linears(nn.Module):
    """As many linears as an 8B model has, each dimension divided by `smaller`."""

    def __init__(self, smaller: int, layers: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            nn.Linear(k // smaller, n // smaller, bias=False, dtype=torch.bfloat16)
            for _ in range(layers)
            for n, k in SHAPES
        )


def quantized(smaller: int, layers: int) -> nn.Module:
    """Return the linears in two formats by turns."""
    model = Linears(smaller, layers)
    for number, linear in enumerate(model.linears):
        format_id = list(KERNELS)[number // len(SHAPES) % 2]
        few, many = KERNELS[format_id]
        steps = (RouteStep(upper_m=8, kernel=few), RouteStep(upper_m=None, kernel=many))
        stored = get_format(format_id).store(linear.weight.data)
        routed = RoutedWeight.wrap(stored, format_id, steps, torch.bfloat16)
        linear.weight = nn.Parameter(routed, requires_grad=False)
    return take_apart(model)


def cpu_s(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for smaller, layers in ((8, LAYERS), (1, 2)):
        model = quantized(smaller, layers)
        place = folder / f"{smaller}"
        place.mkdir(parents=True)
        about = {"dtype": "bfloat16", "source": {"kind": "live"}, "joined": []}
        checkpoint.write_module(model, about, place)
        empty = Linears(smaller, layers)
        load_s = cpu_s(lambda place=place, empty=empty: take_apart(checkpoint.read(place, empty)))
        check_s = cpu_s(lambda empty=empty: check_kernels(empty))
        print(
            f"{len(model.linears)} linears, 1/{smaller} of the size: read in {load_s:.2f} s, "
            f"{check_kernels(empty)} results checked in {check_s:.2f} s"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
