"""Plans of the exact front, spread over it. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autoquant.records import Objective, Plan
from autoquant.solver.solve import AdditiveProblem, Picks, front, undominated
from autoquant.solver.space import SearchSpace

LOSS_BUDGETS = 16
"""The exact front is solved for so many budgets."""
_DISTINGUISHABLE = 64.0
"""A plan that loses less than this fraction of the allowed loss counts as exact."""


def front_plans(
    space: SearchSpace,
    *,
    count: int,
    max_loss: float | None,
    max_memory_bytes: int | None,
    minimize: Objective = "time",
    room_bytes: int | None = None,
) -> list[Plan]:
    """Return plans of the exact front, first the fastest (or smallest) one within the limits.

    Args:
        max_loss: The plan loss that the limits of quality are expected to allow (None: no limit).
        room_bytes: Plans that take more are left out; None for any size.
    """
    problem, summed = space.problem, space.budget(max_loss)
    target = space.solve(minimize, max_summed_loss=summed, max_memory_bytes=max_memory_bytes)
    chosen = [] if target is None else [target]
    if count > len(chosen):
        points = undominated(problem, front(problem, LOSS_BUDGETS))
        if room_bytes is not None:
            points = [picks for picks in points if space.memory_bytes(picks) <= room_bytes]
        chosen += spread(
            problem,
            points,
            count - len(chosen),
            taken=chosen,
            least_loss=_smallest_loss(summed),
        )
    wanted = f"front: {'fastest' if minimize == 'time' else 'smallest'} within limits"
    plans = []
    for number, picks in enumerate(chosen, start=1):
        label = wanted if target is not None and number == 1 else f"front {number}"
        plans.append(space.plan(picks, label, "front"))
    return plans


def _smallest_loss(budget: float | None) -> float:
    """Return the summed loss below which plans do not differ, for the budget of a plan."""
    if budget is None or not math.isfinite(budget):  # the limit is above all that is predicted
        return 0.0
    return budget / _DISTINGUISHABLE


def spread(
    problem: AdditiveProblem,
    points: Sequence[Picks],
    count: int,
    taken: Sequence[Picks] = (),
    least_loss: float = 0.0,
) -> list[Picks]:
    """Return `count` of the points, each as far as can be from those already chosen.

    Distances are of time, log of loss, and memory, each scaled to 1.

    Args:
        least_loss: Losses below it count as if they were this.
    """
    pool = [p for p in points if p not in taken]
    if not pool or count <= 0:
        return []
    totals = np.array([problem.totals(p) for p in [*pool, *taken]])
    positive = totals[:, 1][totals[:, 1] > 0]
    # A loss of 0 has no logarithm: it counts as a tenth of the least other one.
    lowest = positive.min() * 0.1 if len(positive) else 1.0
    floor = max(lowest, least_loss)
    totals[:, 1] = np.log(np.maximum(totals[:, 1], floor))
    span = totals.max(axis=0) - totals.min(axis=0)
    where = (totals - totals.min(axis=0)) / np.where(span > 0, span, 1.0)
    # Farthest-point sampling: each time take the point whose nearest chosen one is farthest.
    own, fixed = where[: len(pool)], where[len(pool) :]
    chosen: list[int] = []
    distance = np.full(len(pool), np.inf)
    for other in fixed:
        distance = np.minimum(distance, np.linalg.norm(own - other, axis=1))
    for _ in range(min(count, len(pool))):
        # The first of all is the fastest, as there is nothing to be far from.
        first = not len(fixed) and not chosen
        best = int(np.argmin(own[:, 0])) if first else int(np.argmax(distance))
        chosen.append(best)
        distance = np.minimum(distance, np.linalg.norm(own - own[best], axis=1))
        distance[best] = -1.0  # never again
    return [pool[i] for i in chosen]
