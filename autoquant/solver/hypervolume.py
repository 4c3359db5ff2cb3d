"""Rate a front by one number: the area that it beats in the plane of cost and loss. No torch.

This is the hypervolume indicator (Zitzler and Thiele 1998, "Multiobjective Optimization Using
Evolutionary Algorithms"): the area in which some point is no worse in both coordinates, up to a
reference point that is worse than all points that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the area that points beat. In both coordinates, less is better.

    Points beyond the reference in either coordinate count for nothing.
    """
    area, lowest = 0.0, reference[1]
    # From the cheapest on: each adds what its rectangle has below those of the points before.
    for x, y in sorted(points):
        if x < reference[0] and y < lowest:
            area += (reference[0] - x) * (lowest - y)
            lowest = y
    return area


@dataclass(slots=True)
class Growth:
    """Decides when a front has stopped growing.

    It has stopped if its hypervolume grew by no more than `least_growth` over the last `patience`
    points.

    Attributes:
        points: The front to begin with.
        reference: Points beyond it do not count.
        least_growth: A fraction of the hypervolume.
    """

    points: list[Point]
    reference: Point
    patience: int
    least_growth: float
    _volumes: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._volumes.append(hypervolume(self.points, self.reference))

    def add(self, point: Point | None) -> None:
        """Count one more evaluation; None if it failed."""
        if point is not None:
            self.points.append(point)
        self._volumes.append(hypervolume(self.points, self.reference))

    @property
    def last_growth(self) -> float:
        """The fraction by which the hypervolume grew over the last `patience` evaluations.

        Infinite before there are that many.
        """
        if len(self._volumes) <= self.patience:
            return float("inf")
        before, now = self._volumes[-1 - self.patience], self._volumes[-1]
        if before > 0:
            return now / before - 1
        return float("inf") if now > 0 else 0.0

    @property
    def ended(self) -> bool:
        """Whether the front has stopped growing."""
        return self.last_growth <= self.least_growth
