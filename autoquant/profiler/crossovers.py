"""Where one kernel of a format overtakes another between two numbers of rows: measured by bisection, not assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from math import isqrt

from autoquant.candidates import Format, Kernel
from autoquant.records import LinearShape, Measurement, TimingSubject

Cell = tuple[LinearShape, int]
Timings = Mapping[TimingSubject, Measurement]
Measure = Callable[[Sequence[TimingSubject]], Timings]

CLOSE_ENOUGH = 2.0
"""A crossover is known well enough when it lies between two measured m of at most this ratio."""


def numerics_sets(kernels: Sequence[Kernel]) -> Iterator[tuple[str, ...]]:
    """Every set of activation numerics that a route over these kernels may be confined to."""
    numerics = list(dict.fromkeys(kernel.numerics for kernel in kernels))
    for size in range(1, len(numerics) + 1):
        yield from combinations(numerics, size)


class FormatTimings:
    """What was measured of one format on one shape, by kernel and m."""

    def __init__(self, shape: LinearShape, format_id: str, working_set: int, timings: Timings) -> None:
        self._shape, self._format, self._working_set, self._timings = shape, format_id, working_set, timings

    def subject(self, kernel: str, m: int) -> TimingSubject:
        """What a timing of `kernel` at `m` is about."""
        return TimingSubject(
            shape=self._shape, m=m, format=self._format, kernel=kernel, working_set_bytes=self._working_set
        )

    def latency_us(self, kernel: str, m: int) -> float | None:
        """None where the kernel was not timed, or cannot be used."""
        found = self._timings.get(self.subject(kernel, m))
        return found.latency_us if found is not None and found.outcome == "ok" else None

    def fastest(self, kernels: Sequence[Kernel], allowed: Sequence[str], m: int) -> str | None:
        """The fastest kernel at `m` with one of the allowed numerics; None where none can be used."""
        usable = {kernel.id: self.latency_us(kernel.id, m) for kernel in kernels if kernel.numerics in allowed}
        timed = {kernel: latency for kernel, latency in usable.items() if latency is not None}
        return min(timed, key=lambda kernel: timed[kernel], default=None)

    def interval(self, low: int, high: int, before: str, after: str) -> tuple[int, int]:
        """Between which m `after` overtakes `before`, as far as what was measured between `low` and `high` tells."""
        own = (self._shape, self._format, self._working_set)
        rows = {s.m for s in self._timings if (s.shape, s.format, s.working_set_bytes) == own}
        for m in sorted(m for m in rows if low < m < high):
            first, second = self.latency_us(before, m), self.latency_us(after, m)
            if second is not None and (first is None or second < first):
                return low, m
            if first is not None:
                low = m
        return low, high


def measure_crossovers(
    cells: Sequence[Cell],
    candidates: Sequence[tuple[Format, Kernel]],
    timings: Timings,
    working_set: int,
    measure: Measure,
) -> dict[TimingSubject, Measurement]:
    """Bisect between every two neighbouring m of a shape at which a format's route changes its kernel.

    Args:
        timings: What is known of the cells.
        measure: Times subjects, or takes them from the store.

    Returns:
        The measurements made on the way: at each m in between, both kernels.
    """
    formats: dict[str, list[Kernel]] = {}
    for fmt, kernel in candidates:
        formats.setdefault(fmt.id, []).append(kernel)
    rows: dict[LinearShape, list[int]] = {}
    for shape, m in cells:
        rows.setdefault(shape, []).append(m)
    made: dict[TimingSubject, Measurement] = {}
    while True:
        known = {**timings, **made}
        wanted = {
            subject: None
            for shape, all_m in rows.items()
            for format_id, kernels in formats.items()
            for subject in _halves(FormatTimings(shape, format_id, working_set, known), kernels, sorted(all_m))
            if subject not in known
        }
        if not wanted:
            return made
        made |= measure(list(wanted))


def _halves(timings: FormatTimings, kernels: Sequence[Kernel], rows: Sequence[int]) -> Iterator[TimingSubject]:
    """The subjects that halve an interval in which a crossover lies."""
    for allowed in numerics_sets(kernels):
        for low, high in pairwise(rows):
            before, after = (timings.fastest(kernels, allowed, m) for m in (low, high))
            if before is None or after is None or before == after:
                continue
            start, end = timings.interval(low, high, before, after)
            if end > CLOSE_ENOUGH * start:
                yield from (timings.subject(kernel, isqrt(start * end)) for kernel in (before, after))
