"""Routes that hold for any number of rows.

A search makes routes of kernels that it timed, at the m of its workload. A model is also given other m: whole windows where its
quality is measured, batches of another size. Some kernels take only few rows, or only many.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from autoquant.candidates.base import A16, Format, Kernel
from autoquant.records import LinearShape, Route, RouteStep

MOST_ROWS = 1 << 20


def for_any_rows(route: Route, fmt: Format, shape: LinearShape, device_type: str) -> Route:
    """The route with other kernels of the format at the m that its own cannot compute.

    Those are the route's other kernels, or such as round an activation no more than they do. Where there is none, or a kernel
    cannot be used on the device at all, the route stays as it is.
    """
    taken = {kernel.id: _rows(fmt, kernel, shape, device_type) for kernel in fmt.kernels}
    numerics = {A16, *(fmt.kernel(step.kernel).numerics for step in route)}
    stand_ins = [step.kernel for step in route] + [k.id for k in fmt.kernels if k.numerics in numerics]
    found: list[tuple[int, str]] = []
    start = 1
    for step in route:
        end = MOST_ROWS if step.upper_m is None else step.upper_m
        first, last = taken[step.kernel] or (start, end)
        own = (max(start, first), min(end, last))
        for low, high in ((start, min(end, first - 1)), own, (max(start, last + 1), end)):
            if low <= high:
                able = (name for name in stand_ins if _within(low, high, taken[name]))
                found.append((high, step.kernel if (low, high) == own else next(able, step.kernel)))
        start = end + 1
    return _merged(found)


def route_words(route: Route) -> str:
    """`rows up to 16 rows, unpack-matmul above`."""
    return ", ".join(f"{s.kernel} {'above' if s.upper_m is None else f'up to {s.upper_m} rows'}" for s in route)


def _within(low: int, high: int, rows: tuple[int, int] | None) -> bool:
    return rows is not None and rows[0] <= low and high <= rows[1]


def _rows(fmt: Format, kernel: Kernel, shape: LinearShape, device_type: str) -> tuple[int, int] | None:
    """The least and the most rows that a kernel takes; None where it takes neither one nor very many."""

    def takes(m: int) -> bool:
        return fmt.unsupported_reason(kernel, shape, m, device_type) is None

    few, many = takes(1), takes(MOST_ROWS)
    if few and many:
        return 1, MOST_ROWS
    if few:
        return 1, bisect_left(range(MOST_ROWS), True, key=lambda m: m > 0 and not takes(m)) - 1
    if many:
        return bisect_left(range(MOST_ROWS), True, key=lambda m: m > 0 and takes(m)), MOST_ROWS
    return None


def _merged(found: Sequence[tuple[int, str]]) -> Route:
    """Steps of one kernel that follow one another as one."""
    last = [i for i, (_, kernel) in enumerate(found) if i + 1 == len(found) or found[i + 1][1] != kernel]
    return tuple(RouteStep(upper_m=None if i + 1 == len(found) else found[i][0], kernel=found[i][1]) for i in last)
