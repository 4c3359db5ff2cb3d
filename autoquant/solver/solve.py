"""The exact solver of the additive model. Numbers in, numbers out: no models, no database, no torch.

Choosing one option per layer so that summed time is least within budgets for summed loss and memory is the multiple-choice
knapsack problem, which `autoquant.solver.knapsack` solves to optimality. Options that cannot be part of a best solution, since
another one of their layer is no worse in anything that counts, are left out first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from autoquant.solver.knapsack import Indices, Knapsack

Vector = NDArray[np.float64]
Picks = tuple[int, ...]
_TIE_BREAK = 1e-6


@dataclass(frozen=True, slots=True)
class Problem:
    """One array per layer and objective, an entry per option.

    Attributes:
        together: Sets of options, each as (layer, option), of which all are taken or none.
        alike: Sets of (layer, its options in the set), a layer each, of which every layer takes one or none does.
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
    ) -> Problem:
        """From (time, loss, memory) triples per layer."""
        columns = [np.asarray(layer, dtype=np.float64).reshape(-1, 3).T for layer in options]
        time, loss, memory = (tuple(c[objective] for c in columns) for objective in range(3))
        same = tuple(tuple((layer, tuple(of)) for layer, of in members) for members in alike)
        return cls(time, loss, memory, tuple(map(tuple, together)), same)

    @property
    def equalities(self) -> list[tuple[tuple[int, tuple[int, ...]], ...]]:
        """`together` and `alike` in one form: of each set every layer takes one option, or none does."""
        pairs = [tuple((layer, (option,)) for layer, option in options) for options in self.together]
        return [*pairs, *self.alike]

    def totals(self, picks: Picks) -> tuple[float, float, float]:
        """Summed (time, loss, memory) of a solution."""
        return (
            float(sum(layer[i] for layer, i in zip(self.time, picks, strict=True))),
            float(sum(layer[i] for layer, i in zip(self.loss, picks, strict=True))),
            float(sum(layer[i] for layer, i in zip(self.memory, picks, strict=True))),
        )


def fastest(problem: Problem, max_loss: float | None = None, max_memory: float | None = None) -> Picks | None:
    """The solution of least time within the budgets (None: unlimited), or None where there is none.

    Among equally fast ones it prefers less loss and less memory, so that no other solution beats it in all three.
    """
    objective = _scaled(problem.time) + _TIE_BREAK * (_scaled(problem.loss) + _scaled(problem.memory))
    return _minimise(problem, objective, max_loss=max_loss, max_memory=max_memory)


def smallest(problem: Problem, max_loss: float | None = None) -> Picks | None:
    """The solution of least memory within a loss budget; among equals the faster one."""
    objective = _scaled(problem.memory) + _TIE_BREAK * (_scaled(problem.time) + _scaled(problem.loss))
    return _minimise(problem, objective, max_loss=max_loss)


def most_exact(problem: Problem, max_memory: float | None = None) -> Picks | None:
    """The solution of least loss within a memory budget; among equals the faster one."""
    return _minimise(problem, _scaled(problem.loss) + _TIE_BREAK * _scaled(problem.time), max_memory=max_memory)


def front(problem: Problem, points: int = 24) -> list[Picks]:
    """Exact points of the front over time, loss and memory, fastest first.

    Loss budgets are spaced geometrically between what the most exact and the fastest solutions cost; for each the fastest
    solution is found, and once more with memory budgets between that one's and the smallest possible. Every solution is
    optimal for its budgets; those that another one beats in all three are left out.
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


def undominated(problem: Problem, solutions: Sequence[Picks]) -> list[Picks]:
    """Those solutions that no other one equals or beats in time, loss and memory at once."""
    totals = {picks: np.asarray(problem.totals(picks)) for picks in solutions}
    return [
        picks
        for picks, own in totals.items()
        if not any(np.all(other <= own) and np.any(other < own) for other in totals.values())
    ]


def _budgets(low: float, high: float, points: int) -> Vector:
    if high <= low:
        return np.asarray([high])
    floor = max(low, high * 1e-4)
    grid = np.geomspace(floor, high, points)
    return np.asarray(grid, dtype=np.float64)


def _scaled(layers: Sequence[Vector]) -> Vector:
    """The concatenated entries, less each layer's least one, in units of the largest possible sum."""
    shifted = [layer - layer.min() for layer in layers]
    scale = sum(float(layer.max()) for layer in shifted)
    return np.concatenate(shifted) / (scale or 1.0)


def _minimise(
    problem: Problem,
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
    weights = np.stack([_scaled(layers) for layers, _ in limits]) if limits else np.empty((0, len(objective)))
    sizes = [len(layer) for layer in problem.time]
    owners = np.repeat(np.arange(len(sizes)), sizes)
    kept = _unbeaten(problem, np.vstack((objective, weights)))
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
    if _over(loss, max_loss) or _over(memory, max_memory):  # by what the solver's tolerance lets through
        return (
            None
            if attempts <= 1
            else _minimise(
                problem,
                objective,
                max_loss=None if max_loss is None else max_loss - 2 * max(loss - max_loss, 0.0),
                max_memory=None if max_memory is None else max_memory - 2 * max(memory - max_memory, 0.0),
                attempts=attempts - 1,
            )
        )
    return _without_waste(problem, picks)


def _allowance(layers: Sequence[Vector], budget: float) -> float:
    """What a budget leaves beyond the least possible sum, in units of `_scaled`."""
    scale = sum(float(layer.max() - layer.min()) for layer in layers) or 1.0
    return (budget - sum(float(layer.min()) for layer in layers)) / scale


def _unbeaten(problem: Problem, columns: NDArray[np.float64]) -> Indices:
    """The options, counted through all layers, that no other one of their layer and sets equals or beats in every row."""
    kept, start = [], 0
    for sets in _memberships(problem):
        own = columns[:, start : start + len(sets)]
        no_worse = np.all(own[:, :, None] <= own[:, None, :], axis=0) & (sets[:, None] == sets[None, :])
        comes_first = np.triu(np.ones_like(no_worse), 1)
        beaten = np.any(no_worse & (~no_worse.T | comes_first), axis=0)
        kept.append(start + np.flatnonzero(~beaten))
        start += len(sets)
    return np.concatenate(kept)


def _equalities(problem: Problem, sizes: Sequence[int]) -> csr_array:
    """A row for every layer of a set: it takes as many options of the set as the set's first layer."""
    starts = np.concatenate(([0], np.cumsum(sizes)))
    pairs = [(first, other) for first, *others in problem.equalities for other in others]
    entries = [
        (sign, row, int(starts[layer]) + option)
        for row, pair in enumerate(pairs)
        for sign, (layer, options) in zip((1.0, -1.0), pair, strict=True)
        for option in options
    ]
    signs, rows, columns = zip(*entries, strict=True) if entries else ((), (), ())
    return csr_array((signs, (rows, columns)), shape=(len(pairs), int(starts[-1])))


def _over(total: float, budget: float | None) -> bool:
    return budget is not None and total > budget * (1 + 1e-12)


def _memberships(problem: Problem) -> list[Indices]:
    """For each layer a number for each option: the same for those that belong to the same sets of `together` and `alike`."""
    sets: dict[tuple[int, int], tuple[int, ...]] = {}
    for number, members in enumerate(problem.equalities):
        for layer, options in members:
            for option in options:
                sets[layer, option] = (*sets.get((layer, option), ()), number)
    numbers = {each: number for number, each in enumerate(dict.fromkeys(sets.values()), start=1)} | {(): 0}
    return [
        np.asarray([numbers[sets.get((layer, option), ())] for option in range(len(time))])
        for layer, time in enumerate(problem.time)
    ]


def _without_waste(problem: Problem, picks: Picks) -> Picks:
    """The picks with every option replaced that another one of its layer and sets equals or beats in time, loss and memory."""
    better = []
    for time, loss, memory, sets, i in zip(
        problem.time, problem.loss, problem.memory, _memberships(problem), picks, strict=True
    ):
        fits = (time <= time[i]) & (loss <= loss[i]) & (memory <= memory[i]) & (sets == sets[i])
        better.append(int(min(np.flatnonzero(fits).tolist(), key=lambda j: (time[j], loss[j], memory[j]))))
    return tuple(better)
