"""How much of the plane of cost and loss of quality a set of plans beats: one number for a front. No torch.

The hypervolume indicator (Zitzler and Thiele 1998, "Multiobjective Optimization Using Evolutionary Algorithms"): the area that at
least one point is no worse than in both, up to a reference point that is worse than all that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area that points beat, both coordinates the less the better; those beyond the reference in either count for nothing."""
    area, lowest = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < lowest:
            area += (reference[0] - x) * (lowest - y)
            lowest = y
    return area


@dataclass(slots=True)
class Growth:
    """Tells when a front has stopped growing: not by more than a fraction over the last so many points.

    Attributes:
        points: Those before the first one that is waited for.
        reference: Beyond it nothing counts.
    """

    points: list[Point]
    reference: Point
    patience: int
    least_growth: float
    _volumes: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._volumes.append(hypervolume(self.points, self.reference))

    def add(self, point: Point | None) -> None:
        """One more evaluation; None where it failed."""
        if point is not None:
            self.points.append(point)
        self._volumes.append(hypervolume(self.points, self.reference))

    @property
    def last_growth(self) -> float:
        """By what fraction the hypervolume grew over the last `patience` evaluations (infinite before there are so many)."""
        if len(self._volumes) <= self.patience:
            return float("inf")
        before, now = self._volumes[-1 - self.patience], self._volumes[-1]
        return now / before - 1 if before > 0 else float("inf") if now > 0 else 0.0

    @property
    def ended(self) -> bool:
        """Whether it is not worth to go on."""
        return self.last_growth <= self.least_growth
