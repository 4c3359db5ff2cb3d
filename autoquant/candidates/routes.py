"""Extend routes to any number of rows.

A search makes routes from kernels that it timed at the m of its workload. A model also runs at
other m: its quality is measured on whole windows, and users choose other batch sizes. Some kernels
take only few rows, or only many.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from autoquant.candidates.base import A16, Format, Kernel
from autoquant.records import LinearShape, Route, RouteStep

MOST_ROWS = 1 << 20


def for_any_rows(route: Route, fmt: Format, shape: LinearShape, device_type: str) -> Route:
    """Return the route with stand-ins at the m that its own kernels cannot compute.

    Stand-ins are the route's other kernels, then kernels of the format with numerics of the route
    or `A16`. If none fits, or a kernel cannot be used on the device at all, its step is unchanged.
    """
    taken = {kernel.id: _rows(fmt, kernel, shape, device_type) for kernel in fmt.kernels}
    numerics = {A16, *(fmt.kernel(step.kernel).numerics for step in route)}
    stand_ins = [step.kernel for step in route]
    stand_ins += [kernel.id for kernel in fmt.kernels if kernel.numerics in numerics]
    found: list[tuple[int, str]] = []
    start = 1
    for step in route:
        end = MOST_ROWS if step.upper_m is None else step.upper_m
        first, last = taken[step.kernel] or (start, end)
        before = (start, min(end, first - 1))
        own = (max(start, first), min(end, last))
        after = (max(start, last + 1), end)
        for low, high in (before, own, after):
            if low > high:
                continue
            kernel = step.kernel
            if (low, high) != own:
                able = (name for name in stand_ins if _within(low, high, taken[name]))
                kernel = next(able, kernel)
            found.append((high, kernel))
        start = end + 1
    return _merged(found)


def route_words(route: Route) -> str:
    """Return a route in words, such as `rows up to 16 rows, unpack-matmul above`."""
    words = []
    for step in route:
        where = "above" if step.upper_m is None else f"up to {step.upper_m} rows"
        words.append(f"{step.kernel} {where}")
    return ", ".join(words)


def _within(low: int, high: int, rows: tuple[int, int] | None) -> bool:
    return rows is not None and rows[0] <= low and high <= rows[1]


def _rows(
    fmt: Format, kernel: Kernel, shape: LinearShape, device_type: str
) -> tuple[int, int] | None:
    """Return the least and the most rows that a kernel takes.

    None if it supports neither 1 row nor `MOST_ROWS`.
    """

    def takes(m: int) -> bool:
        return fmt.unsupported_reason(kernel, shape, m, device_type) is None

    few, many = takes(1), takes(MOST_ROWS)
    if few and many:
        return 1, MOST_ROWS
    if not few and not many:
        return None
    # The rows at which the answer changes, once: a kernel is for few rows or for many.
    first_other = bisect_left(range(MOST_ROWS), True, key=lambda m: m > 0 and takes(m) != few)
    return (1, first_other - 1) if few else (first_other, MOST_ROWS)


def _merged(found: Sequence[tuple[int, str]]) -> Route:
    """Return (upper m, kernel) pairs as a route, merging neighbours with the same kernel."""
    steps: list[RouteStep] = []
    for upper_m, kernel in found:
        if steps and steps[-1].kernel == kernel:
            steps.pop()
        steps.append(RouteStep(upper_m=upper_m, kernel=kernel))
    if steps:
        steps[-1] = replace(steps[-1], upper_m=None)
    return tuple(steps)
