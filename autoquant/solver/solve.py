"""Solve the additive model exactly. Numbers in, numbers out: no models, no database, no torch.

One option per layer is chosen so that summed time is least within budgets for summed loss and
memory. That is the multiple-choice knapsack problem, which `autoquant.solver.knapsack` solves to
optimality. Options that cannot be part of a best solution are left out first: those that another
option of their layer equals or beats in everything that counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from autoquant.solver import dominance
from autoquant.solver.knapsack import Indices, Knapsack

Vector = NDArray[np.float64]
Picks = tuple[int, ...]
# What decides between equals weighs too little to outweigh what is minimized.
_TIE_BREAK = 1e-6


@dataclass(frozen=True, slots=True)
class AdditiveProblem:
    """One array per layer and objective, an entry per option.

    Attributes:
        together: Sets of options, each as (layer, option), of which all are taken or none.
        alike: Sets of (layer, its options in the set). Every layer of a set takes one of its
            options, or none does.
    """

    time: tuple[Vector, ...]
    loss: tuple[Vector, ...]
    memory: tuple[Vector, ...]
    together: tuple[tuple[tuple[int, int], ...], ...] = ()
    alike: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...] = ()

    @classmethod
    def build(
        cls,
        options: Sequence[Sequence[tuple[float, float, float]]],
        together: Sequence[Sequence[tuple[int, int]]] = (),
        alike: Sequence[Sequence[tuple[int, Sequence[int]]]] = (),
    ) -> AdditiveProblem:
        """Build it from the (time, loss, memory) of each option of each layer."""
        tables = [np.asarray(layer, dtype=np.float64).reshape(-1, 3) for layer in options]
        # Tuples throughout: a problem is never changed.
        sets = [tuple((layer, tuple(of)) for layer, of in members) for members in alike]
        return cls(
            time=tuple(table[:, 0] for table in tables),
            loss=tuple(table[:, 1] for table in tables),
            memory=tuple(table[:, 2] for table in tables),
            together=tuple(map(tuple, together)),
            alike=tuple(sets),
        )

    @property
    def equalities(self) -> list[tuple[tuple[int, tuple[int, ...]], ...]]:
        """`together` and `alike` in one form, that of `alike`."""
        pairs = [
            tuple((layer, (option,)) for layer, option in options) for options in self.together
        ]
        return [*pairs, *self.alike]

    def totals(self, picks: Picks) -> tuple[float, float, float]:
        """Return the summed (time, loss, memory) of a solution."""
        return (
            _picked(self.time, picks),
            _picked(self.loss, picks),
            _picked(self.memory, picks),
        )


def _picked(objective: Sequence[Vector], picks: Picks) -> float:
    """Return the sum of what each layer's picked option has."""
    return float(sum(layer[i] for layer, i in zip(objective, picks, strict=True)))


def fastest(
    problem: AdditiveProblem, max_loss: float | None = None, max_memory: float | None = None
) -> Picks | None:
    """Return the solution of least time within the budgets (None: unlimited), or None.

    Among equally fast ones it prefers less loss and less memory, so that no other solution beats it
    in all three.
    """
    objective = _scaled(problem.time) + _TIE_BREAK * (
        _scaled(problem.loss) + _scaled(problem.memory)
    )
    return _minimise(problem, objective, max_loss=max_loss, max_memory=max_memory)


def smallest(problem: AdditiveProblem, max_loss: float | None = None) -> Picks | None:
    """Return the solution of least memory within a loss budget; among equals the faster one."""
    objective = _scaled(problem.memory) + _TIE_BREAK * (
        _scaled(problem.time) + _scaled(problem.loss)
    )
    return _minimise(problem, objective, max_loss=max_loss)


def most_exact(problem: AdditiveProblem, max_memory: float | None = None) -> Picks | None:
    """Return the solution of least loss within a memory budget; among equals the faster one."""
    return _minimise(
        problem, _scaled(problem.loss) + _TIE_BREAK * _scaled(problem.time), max_memory=max_memory
    )


def front(problem: AdditiveProblem, points: int) -> list[Picks]:
    """Return exact points of the front over time, loss and memory, fastest first.

    Loss budgets are spaced geometrically between what the most exact and the fastest solutions
    cost. For each the fastest and the smallest solution are found, and the fastest one with memory
    halfway between these. Every solution is optimal for its budgets; those that another one beats
    are left out.
    """
    exact = most_exact(problem)
    quick = fastest(problem)
    tiny = smallest(problem)
    if exact is None or quick is None or tiny is None:
        return []
    found = {exact: None, quick: None, tiny: None}
    low, high = (problem.totals(picks)[1] for picks in (exact, quick))
    high = max(high, problem.totals(tiny)[1])
    for budget in _budgets(low, high, points):
        at_budget = fastest(problem, max_loss=budget)
        if at_budget is None:
            continue
        found[at_budget] = None
        least = smallest(problem, max_loss=budget)
        if least is not None:
            found[least] = None
            middle = (problem.totals(at_budget)[2] + problem.totals(least)[2]) / 2
            between = fastest(problem, max_loss=budget, max_memory=middle)
            if between is not None:
                found[between] = None
    return sorted(undominated(problem, list(found)), key=lambda picks: problem.totals(picks))


def undominated(problem: AdditiveProblem, solutions: Sequence[Picks]) -> list[Picks]:
    """Return the solutions that no other one beats in time, loss and memory at once."""
    distinct = list(dict.fromkeys(solutions))
    totals = np.asarray([problem.totals(picks) for picks in distinct]).reshape(-1, 3)
    return [distinct[i] for i in dominance.undominated(totals)]


def _budgets(low: float, high: float, points: int) -> Vector:
    if high <= low:
        return np.asarray([high])
    # A loss of 0 has no place on a geometric grid.
    floor = max(low, high * 1e-4)
    grid = np.geomspace(floor, high, points)
    return np.asarray(grid, dtype=np.float64)


def _scaled(layers: Sequence[Vector]) -> Vector:
    """Concatenate the entries less each layer's least one, in units of the largest possible sum."""
    shifted = [layer - layer.min() for layer in layers]
    scale = sum(float(layer.max()) for layer in shifted)
    return np.concatenate(shifted) / (scale or 1.0)


def _minimise(
    problem: AdditiveProblem,
    objective: Vector,
    max_loss: float | None = None,
    max_memory: float | None = None,
    attempts: int = 4,
) -> Picks | None:
    budgets = ((problem.loss, max_loss), (problem.memory, max_memory))
    limits = [(of, to) for of, to in budgets if to is not None and to < math.inf]
    allowances = np.asarray([_allowance(layers, budget) for layers, budget in limits])
    if np.any(allowances < -1e-9):
        return None
    weights = (
        np.stack([_scaled(layers) for layers, _ in limits])
        if limits
        else np.empty((0, len(objective)))
    )
    sizes = [len(layer) for layer in problem.time]
    owners = np.repeat(np.arange(len(sizes)), sizes)
    kept = _unbeaten(problem, np.vstack((objective, weights)))
    # The tolerance of the linear solver is absolute: large numbers make it a small part of them.
    found = Knapsack(
        cost=objective[kept],
        owners=owners[kept],
        weights=1e6 * weights[:, kept],
        budgets=1e6 * (np.maximum(allowances, 0.0) + 1e-12),
        ties=_equalities(problem, sizes)[:, kept],
    ).least()
    if found is None:
        return None
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    picks = tuple((kept[found] - starts).tolist())
    _, loss, memory = problem.totals(picks)
    if not _over(loss, max_loss) and not _over(memory, max_memory):
        return _without_waste(problem, picks)
    if attempts <= 1:
        return None
    # The solver's tolerance let a budget be exceeded: try again with tighter budgets.
    return _minimise(
        problem,
        objective,
        max_loss=_tightened(max_loss, loss),
        max_memory=_tightened(max_memory, memory),
        attempts=attempts - 1,
    )


def _allowance(layers: Sequence[Vector], budget: float) -> float:
    """Return what a budget leaves beyond the least possible sum, in units of `_scaled`."""
    scale = sum(float(layer.max() - layer.min()) for layer in layers) or 1.0
    return (budget - sum(float(layer.min()) for layer in layers)) / scale


def _unbeaten(problem: AdditiveProblem, columns: NDArray[np.float64]) -> Indices:
    """Return the options, counted through all layers, that none of their layer and sets beats."""
    kept, start = [], 0
    for sets in _memberships(problem):
        own = columns[:, start : start + len(sets)]
        kept.append(start + dominance.unbeaten(own.T, sets))
        start += len(sets)
    return np.concatenate(kept)


def _equalities(problem: AdditiveProblem, sizes: Sequence[int]) -> csr_array:
    """Return a row for every layer of a set: it takes as many of its options as the first layer."""
    starts = np.concatenate(([0], np.cumsum(sizes)))
    # A row has 1 for the options of the first layer, and -1 for those of the other.
    pairs = [(first, other) for first, *others in problem.equalities for other in others]
    signs: list[float] = []
    rows: list[int] = []
    columns: list[int] = []
    for row, pair in enumerate(pairs):
        for sign, (layer, options) in zip((1.0, -1.0), pair, strict=True):
            signs += [sign] * len(options)
            rows += [row] * len(options)
            columns += [int(starts[layer]) + option for option in options]
    return csr_array((signs, (rows, columns)), shape=(len(pairs), int(starts[-1])))


def _over(total: float, budget: float | None) -> bool:
    return budget is not None and total > budget * (1 + 1e-12)


def _tightened(budget: float | None, total: float) -> float | None:
    """Return the budget less twice what `total` exceeds it by."""
    return None if budget is None else budget - 2 * max(total - budget, 0.0)


def _memberships(problem: AdditiveProblem) -> list[Indices]:
    """Number the options of each layer by the sets of `together` and `alike` that they are in."""
    sets: dict[tuple[int, int], tuple[int, ...]] = {}
    for number, members in enumerate(problem.equalities):
        for layer, options in members:
            for option in options:
                sets[layer, option] = (*sets.get((layer, option), ()), number)
    numbers: dict[tuple[int, ...], int] = {(): 0}  # in no set
    for each in sets.values():
        numbers.setdefault(each, len(numbers))
    found = []
    for layer, time in enumerate(problem.time):
        own = [sets.get((layer, option), ()) for option in range(len(time))]
        found.append(np.asarray([numbers[each] for each in own]))
    return found


def _without_waste(problem: AdditiveProblem, picks: Picks) -> Picks:
    """Replace every option that another one of its layer and sets equals or beats."""
    better = []
    for *columns, sets, pick in zip(
        problem.time, problem.loss, problem.memory, _memberships(problem), picks, strict=True
    ):
        points = np.stack(columns, axis=1)
        # Among these is the pick itself.
        fits = dominance.no_worse(points)[:, pick] & (sets == sets[pick])
        candidates = np.flatnonzero(fits).tolist()
        better.append(min(candidates, key=lambda i: tuple(points[i])))
    return tuple(better)
