"""Ranges of sizes, in each of which every layer has one kernel: a program is made for each.

A size is what a program leaves open: sequences of a batch, or tokens of a prompt. A route chooses
by rows, and the rows of a layer grow with the size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autoquant.candidates.calls import LinearCall, LinearHook
from autoquant.candidates.routed import RoutedWeight, kernel_for_rows

_TRIED = (2, 3)
"""Sizes at which rows are counted."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a layer's input: `each` for each unit of the size, and `always` besides."""

    each: int
    always: int

    def at(self, size: int) -> int:
        """Return the rows at a size."""
        return self.each * size + self.always

    def last(self, rows: int) -> int | None:
        """Return the largest size with at most so many rows; None if the size has no effect."""
        return (rows - self.always) // self.each if self.each else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Sizes from `least` to `most`, or any from there on.

    Attributes:
        rows: Of each quantized weight at the least size.
        kernels: By the name of the weight.
    """

    least: int
    most: int | None
    rows: Mapping[str, int]
    kernels: Mapping[str, str]

    def name(self, unit: str) -> str:
        """Return a name for files, e.g. `tokens_2_up`."""
        if self.most == self.least:
            return f"{unit}_{self.least}"
        return f"{unit}_{self.least}_{'up' if self.most is None else f'to_{self.most}'}"


def rows_of(module: nn.Module, run: Callable[[int], object]) -> dict[str, Rows]:
    """Count the rows of each quantized layer. The most count, if a layer is called several times.

    Args:
        run: Runs the module at a size.
    """
    fewer, more = (counted(module, functools.partial(run, size)) for size in _TRIED)
    found = {}
    for name, rows in fewer.items():
        each = (more.get(name, rows) - rows) // (_TRIED[1] - _TRIED[0])
        found[name] = Rows(each, rows - each * _TRIED[0])
    return found


def counted(module: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Return the most rows that each linear has in a run, by the name of its weight."""
    with torch.no_grad(), _RowCounter(module) as counter:
        run()
    rows: dict[str, int] = counter.rows
    return rows


class _RowCounter(LinearHook):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.rows: dict[str, int] = {}
        self._names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)

    def on_linear(self, call: LinearCall) -> None:
        rows = call.x.numel() // call.x.shape[-1]
        for name in self._names.get(id(call.weight), ()):
            self.rows[name] = max(rows, self.rows.get(name, 0))


def ranges(
    weights: Mapping[str, RoutedWeight], rows: Mapping[str, Rows], *, joins_one: bool
) -> list[Range]:
    """Return the ranges from 1 on, in order.

    Size 1 has a range of its own: a program for any size is not made for it.

    Args:
        joins_one: Size 1 belongs to the next range if the kernels are the same.
    """
    starts = {1, 2}
    for name, weight in weights.items():
        for upper, _ in weight.route:
            last = rows[name].last(upper) if upper is not None and name in rows else None
            if last is not None and last >= 1:
                starts.add(last + 1)
    found: list[Range] = []
    ordered = sorted(starts)
    for least, following in zip(ordered, [*ordered[1:], None], strict=True):
        most = None if following is None else following - 1
        made = fixed(weights, rows, least, most)
        if found and made.kernels == found[-1].kernels and (joins_one or found[-1].least > 1):
            last_one = found.pop()
            made = fixed(weights, rows, last_one.least, most)
        found.append(made)
    return found


def fixed(
    weights: Mapping[str, RoutedWeight], rows: Mapping[str, Rows], least: int, most: int | None
) -> Range:
    """Return a range with the kernels of its least size."""
    at = {name: rows[name].at(least) if name in rows else 1 for name in weights}
    kernels = {name: kernel_for_rows(weight.route, at[name]) for name, weight in weights.items()}
    return Range(least=least, most=most, rows=at, kernels=kernels)


def within(found: Sequence[Range], most: int | None) -> list[Range]:
    """Return the ranges up to a largest size."""
    if most is None:
        return list(found)
    kept = [each for each in found if each.least <= most]
    return [
        Range(
            least=each.least,
            most=most if each.most is None else min(each.most, most),
            rows=each.rows,
            kernels=each.kernels,
        )
        for each in kept
    ]
