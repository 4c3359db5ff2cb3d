"""Where one kernel of a format overtakes another between two numbers of rows: measured by bisection, not assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import isqrt

from autoquant.candidates import Kernel, timed_as
from autoquant.records import LayerChoice, LinearShape, Measurement, Plan, Route, TimingSubject

_RouteOfShape = tuple[LinearShape, str, Route]
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

    def rows(self) -> list[int]:
        """The m at which something was measured, in order."""
        own = (self._shape, self._format, self._working_set)
        return sorted({s.m for s in self._timings if (s.shape, s.format, s.working_set_bytes) == own})

    def interval(self, low: int, high: int, before: str, after: str) -> tuple[int, int]:
        """Between which m `after` overtakes `before`, as far as what was measured between `low` and `high` tells."""
        for m in (m for m in self.rows() if low < m < high):
            first, second = self.latency_us(before, m), self.latency_us(after, m)
            if second is not None and (first is None or second < first):
                return low, m
            if first is not None:
                low = m
        return low, high


def settled(plans: Sequence[Plan], timings: Timings, working_set: int, measure: Measure) -> list[Plan]:
    """The plans with every change of kernel in their routes bisected, and put where it was found.

    Args:
        timings: What was measured at the m that the routes were made from. At those the routes stay as they are.
        measure: Times subjects, or takes them from the store.
    """
    keys = dict.fromkeys(key for plan in plans for key in _keys(plan) if len(key[2]) > 1)
    made: dict[TimingSubject, Measurement] = {}
    while True:
        known = {**timings, **made}
        found = {key: _changes(key, FormatTimings(*key[:2], working_set, timings), working_set, known) for key in keys}
        halves = (subject for changes in found.values() for change in changes for subject in change.halves())
        wanted = [subject for subject in dict.fromkeys(halves) if subject not in known]
        if not wanted:
            break
        made |= measure(wanted)
    routes = {key: _moved(key[2], changes) for key, changes in found.items()}
    return [
        replace(
            plan,
            layers=tuple(
                replace(layer, route=routes.get(key, layer.route))
                for layer, key in zip(plan.layers, _keys(plan), strict=True)
            ),
        )
        for plan in plans
    ]


def _keys(plan: Plan) -> list[_RouteOfShape]:
    """What each layer's route was timed at: the shape of all where several layers are computed as one."""
    rows = {layer.name: layer.shape.n for layer in plan.layers}

    def shape(layer: LayerChoice) -> LinearShape:
        if not layer.joined:
            return layer.shape
        return replace(layer.shape, n=sum(rows[name] for name in layer.joined), bias=False)

    return [(shape(layer), timed_as(layer.format), layer.route) for layer in plan.layers]


@dataclass(frozen=True, slots=True)
class _Change:
    """A route's change of kernel, which lies between `low` and `high` rows."""

    timings: FormatTimings
    before: str
    after: str
    low: int
    high: int

    def halves(self) -> Iterator[TimingSubject]:
        """What to time next; nothing where the change is known well enough."""
        if self.high > CLOSE_ENOUGH * self.low:
            for kernel in (self.before, self.after):
                yield self.timings.subject(kernel, isqrt(self.low * self.high))


def _changes(key: _RouteOfShape, first: FormatTimings, working_set: int, known: Timings) -> list[_Change]:
    shape, format_id, route = key
    timings = FormatTimings(shape, format_id, working_set, known)
    changes = []
    for step, following in pairwise(route):
        assert step.upper_m is not None  # only the last step has no end
        low = max(m for m in first.rows() if m <= step.upper_m)
        high = min(m for m in first.rows() if m > step.upper_m)
        between = timings.interval(low, high, step.kernel, following.kernel)
        changes.append(_Change(timings, step.kernel, following.kernel, *between))
    return changes


def _moved(route: Route, changes: Sequence[_Change]) -> Route:
    """The route with each change at the geometric mean of the two m between which it was measured."""
    moved = (replace(step, upper_m=isqrt(c.low * c.high)) for step, c in zip(route, changes, strict=False))
    return (*moved, route[-1])
