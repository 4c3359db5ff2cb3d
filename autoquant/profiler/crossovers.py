"""Find the number of rows at which one kernel of a format overtakes another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, isqrt, log

from autoquant.candidates import timed_as
from autoquant.profiler.timing_table import FormatTimings, TimingTable
from autoquant.records import LayerChoice, LinearShape, Measurement, Plan, Route, TimingSubject

Measure = Callable[[Sequence[TimingSubject]], Mapping[TimingSubject, Measurement]]
"""Times subjects, or takes them from the store."""

Can = Callable[[TimingSubject], bool]
"""Says whether a kernel takes the shape and m of a subject."""

HasTime = Callable[[int], bool]
"""Says whether there is time to time so many subjects."""

CLOSE_ENOUGH = 2.0
"""A crossover is known well enough when it lies between two measured m of at most this ratio."""


@dataclass(frozen=True, slots=True)
class _TimedRoute:
    """A route, and the shape and format that its kernels were timed with."""

    shape: LinearShape
    format: str
    route: Route


@dataclass(frozen=True, slots=True)
class _Change:
    """A route's change of kernel, which lies between `low` and `high` rows."""

    timings: FormatTimings
    before: str
    after: str
    low: int
    high: int

    def between(self, can: Can) -> Iterator[TimingSubject]:
        """Yield what to time next; nothing if the change is known well enough.

        These are both kernels at several m, since on a GPU preparing few takes as long as many. A
        kernel that cannot be used at an m decides there without being timed, nor the other one.
        """
        steps = ceil(log(self.high / self.low) / log(CLOSE_ENOUGH))
        for step in range(1, steps):
            m = round(self.low * (self.high / self.low) ** (step / steps))
            both = [self.timings.subject(kernel, m) for kernel in (self.before, self.after)]
            cannot = [subject for subject in both if not can(subject)]
            yield from cannot or both


@dataclass(frozen=True, slots=True)
class Placed:
    """Plans with measured changes of kernel.

    Attributes:
        complete: Every change is known well enough: there was time to measure all.
    """

    plans: list[Plan]
    complete: bool


def place_crossovers(
    plans: Sequence[Plan],
    timings: TimingTable,
    measure: Measure,
    has_time: HasTime = lambda _count: True,
    can: Can = lambda _subject: True,
) -> Placed:
    """Return the plans, with each change of kernel in a route at the measured number of rows.

    A change that there is no time to measure stays in the middle of where it is known to lie.

    Args:
        timings: Made at the m that the routes come from. At those m the routes stay unchanged.
        measure: Called until every change is known well enough.
    """
    every = [each for plan in plans for each in _routes(plan)]
    routes = dict.fromkeys(each for each in every if len(each.route) > 1)
    known = timings
    while True:
        found = {route: _changes(route, timings, known) for route in routes}
        between: list[TimingSubject] = []
        for changes in found.values():
            for change in changes:
                between.extend(change.between(can))
        wanted = known.missing(between)
        if not wanted or not has_time(len(wanted)):
            break
        known = known.extended(measure(wanted))
    moved = {route: _moved(route.route, changes) for route, changes in found.items()}
    return Placed([_with_routes(plan, moved) for plan in plans], complete=not wanted)


def _with_routes(plan: Plan, moved: Mapping[_TimedRoute, Route]) -> Plan:
    pairs = zip(plan.layers, _routes(plan), strict=True)
    layers = (replace(layer, route=moved.get(route, layer.route)) for layer, route in pairs)
    return replace(plan, layers=tuple(layers))


def _routes(plan: Plan) -> list[_TimedRoute]:
    """Return the route of each layer, with the shape and format that it was timed with.

    Layers that are computed as one were timed at the shape of all of them.
    """
    rows = {layer.name: layer.shape.n for layer in plan.layers}

    def timed_shape(layer: LayerChoice) -> LinearShape:
        if not layer.joined:
            return layer.shape
        return replace(layer.shape, n=sum(rows[name] for name in layer.joined), bias=False)

    return [
        _TimedRoute(timed_shape(layer), timed_as(layer.format), layer.route)
        for layer in plan.layers
    ]


def _changes(route: _TimedRoute, first: TimingTable, known: TimingTable) -> list[_Change]:
    """Return the changes of a route, each between the nearest m that are known.

    Args:
        first: What the route was made from.
        known: That, and what was measured since.
    """
    timings = known.of(route.shape, route.format)
    rows = first.of(route.shape, route.format).rows()
    changes = []
    for step, following in pairwise(route.route):
        assert step.upper_m is not None  # only the last step has no end
        low = max(m for m in rows if m <= step.upper_m)
        high = min(m for m in rows if m > step.upper_m)
        between = timings.crossover(low, high, step.kernel, following.kernel)
        changes.append(_Change(timings, step.kernel, following.kernel, *between))
    return changes


def _moved(route: Route, changes: Sequence[_Change]) -> Route:
    """Return the route with each change at the geometric mean of the two m around it."""
    moved = (
        replace(step, upper_m=isqrt(c.low * c.high))
        for step, c in zip(route, changes, strict=False)
    )
    return (*moved, route[-1])
