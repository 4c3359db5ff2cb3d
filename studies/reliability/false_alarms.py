"""Measure how far right kernels stay below the limits of the checks.

    python studies/reliability/false_alarms.py

Every candidate that a search tries by default on a CPU runs eagerly on random numbers, on linears
of the shapes of two Llama models. Prints a line a candidate: its largest errors as parts of the
limits, its largest relative error against float64, and what was called wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from autoquant.candidates import Candidate, multiplied_numbers, select
from autoquant.candidates.check import (
    MAX_ELEMENT_ERROR,
    MAX_RELATIVE_ERROR,
    changed,
    fault,
    reference,
    relative_error,
)
from autoquant.profiler.timing import LinearToTime
from autoquant.records import LinearShape

SHAPES = (
    *((512, 512), (256, 512), (1408, 512), (512, 1408), (8192, 512)),
    *((576, 576), (192, 576), (1536, 576), (576, 1536)),
)
ROWS = (1, 2, 5, 33, 64)


@dataclass
class Worst:
    """The largest errors of a candidate, and all that was called wrong."""

    relative: float = 0.0
    element: float = 0.0
    relative_64: float = 0.0
    results: int = 0
    wrong: list[str] = field(default_factory=list)


def main() -> None:
    worst: dict[str, Worst] = {}
    for n, k in SHAPES:
        shape = LinearShape(n=n, k=k, bias=False, dtype="bfloat16")
        weight = LinearToTime(shape, 1, "cpu").weight
        for candidate in select(["*"], "cpu"):
            if not candidate.format.rounds:
                measure(candidate, shape, weight, worst.setdefault(candidate.id, Worst()))
    print("| candidate | norm | one output | against float64 | results | wrong |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, each in worst.items():
        if each.results:
            errors = f"{each.relative:.0%} | {each.element:.0%} | {each.relative_64:.4f}"
            print(f"| {name} | {errors} | {each.results} | {'; '.join(each.wrong)} |")


@torch.no_grad()
def measure(candidate: Candidate, shape: LinearShape, weight: torch.Tensor, worst: Worst) -> None:
    """Run a candidate on one weight with several numbers of rows."""
    fmt, kernel = candidate.format, candidate.kernel
    rows = [m for m in ROWS if fmt.unsupported_reason(kernel, shape, m, "cpu") is None]
    if not rows:
        return
    stored = fmt.sample(weight)
    rounding = fmt.activation_rounding(kernel.numerics, stored)
    numbers = multiplied_numbers(fmt, stored, kernel.numerics)
    numbers_64 = numbers.double()
    for m in rows:
        generator = torch.Generator().manual_seed(m)
        x = torch.randn(1, m, shape.k, generator=generator).bfloat16()
        expected = reference(rounding, numbers, x, None)
        y = kernel.linear(x, stored, None)
        exact = F.linear(rounding(x.float()).double(), numbers_64)
        typical = expected.norm() / expected.numel() ** 0.5
        beyond = (y.float() - expected).abs() - MAX_RELATIVE_ERROR * expected.abs()
        relative_64 = float(((y.double() - exact).norm() / exact.norm()).item())
        element = float((beyond.max() / typical).item()) / MAX_ELEMENT_ERROR
        worst.relative = max(worst.relative, relative_error(y, expected) / MAX_RELATIVE_ERROR)
        worst.element = max(worst.element, element)
        worst.relative_64 = max(worst.relative_64, relative_64)
        worst.results += 1
        reason = fault(y, expected, y.dtype)
        if not reason and changed(kernel.linear(x, stored, None), y):
            reason = "other bits the second time"
        if reason:
            worst.wrong.append(f"{shape.n} x {shape.k}, m={m}: {reason}")


if __name__ == "__main__":
    main()
