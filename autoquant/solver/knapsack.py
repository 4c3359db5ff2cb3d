"""Choosing one option per layer at least cost within budgets, solved to optimality: the multiple-choice knapsack problem.

The linear relaxation bounds the least cost from below, and its duals say for every option by how much a solution with it must at
least lie above that bound: its regret. All solutions within some limit above the bound are made of options whose regret is within
it. These are enumerated layer by layer, what weighs most first; partial solutions that Lagrangian bounds of the rest show to come
to nothing within limit and budgets are dropped, and so are those that another one beats. The best of what is left is optimal;
where nothing is, the limit is raised, by less where that is too much (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004,
chapter 11, for regrets, the core and dominance; here with two budgets, hence several multipliers).

Where ties bind layers together, or too much is left, the options within a limit go to the branch and cut of HiGHS
(https://highs.dev), again until what it finds is within that limit.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Indices = NDArray[np.int64]
# Multipliers of the bounds, over the duals; the first limit above the relaxation, of what a solution costs at most.
_MULTIPLES = (0.7, 0.85, 1.0, 1.2, 1.4)
_FIRST_LIMIT = 1e-6
# How many partial solutions are tried under one limit, and by how much the limit is raised; then by which it can no longer be.
_EFFORTS = ((20_000, 1.5), (200_000, 1.1), (2_000_000, 1.05))
_CLOSE = 1.02
# So many partial solutions are looked through for those that others beat.
_MANY = 200
_CORE_PER_LAYER = 1.3
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """The linear relaxation.

    Attributes:
        prices: What a unit of each budget is worth, never positive.
        bound: No solution costs less.
        regrets: A solution with that option costs at least that much more.
    """

    prices: Vector
    bound: float
    regrets: Vector


class _TooManyError(Exception):
    """More partial solutions than are worth keeping."""


@dataclass(frozen=True, slots=True)
class Knapsack:
    """Least `cost @ x` over x of 0 and 1: of each layer one option, `weights @ x <= budgets`, `ties @ x = 0`.

    Attributes:
        cost: Of each option, in units of what a solution costs at most.
        owners: The layer of each option, ascending; every layer has one.
        weights: A row for each budget.
        ties: A row for each.
    """

    cost: Vector
    owners: Indices
    weights: Matrix
    budgets: Vector
    ties: csr_array

    def least(self) -> Indices | None:
        """The option of each layer in a solution of least cost, or None where there is none."""
        relaxed = self._relaxation()
        if relaxed is None:
            return None
        if self.ties.shape[0]:
            return self._branched(relaxed)
        nothing, something = _FIRST_LIMIT, math.inf
        for most_tried, growth in _EFFORTS:
            too_many = math.inf
            while nothing * _CLOSE < too_many:
                limit = something if something < too_many else min(nothing * growth, math.sqrt(nothing * too_many))
                try:
                    found = self._enumerated(relaxed, limit, most_tried)
                except _TooManyError:
                    too_many = limit
                else:
                    above = math.inf if found is None else float(self.cost[found].sum()) - relaxed.bound
                    if above <= limit + _ROUNDING or limit > len(self.cost):
                        return found
                    nothing, something = limit, min(something, above)
        return self._branched(relaxed)

    def _enumerated(self, relaxed: _Relaxed, limit: float, most_tried: int) -> Indices | None:
        """The best of all solutions that cost at most the bound and the limit; where there is none, at times a dearer one.

        Raises:
            _TooManyError: There are too many partial ones.
        """
        core = np.flatnonzero(relaxed.regrets <= limit)
        measures = np.vstack((self.cost, self.weights))[:, core].T
        # A row for each choice of multipliers: cost less prices @ weights.
        prices = np.array(list(itertools.product(_MULTIPLES, repeat=len(self.budgets)))) * relaxed.prices
        lagrangian = np.vstack((np.ones(len(prices)), -prices.T))
        starts = _starts(self.owners[core])
        least = np.minimum.reduceat(measures @ lagrangian, starts)
        most = relaxed.bound + limit + _ROUNDING - prices @ self.budgets - least.sum(0)
        ends = np.append(starts[1:], len(core))
        partial = np.zeros((1, measures.shape[1]))
        trail: list[tuple[int, Indices]] = []
        tried = 0
        spread = np.maximum.reduceat(measures[:, 1:], starts) - np.minimum.reduceat(measures[:, 1:], starts)
        for layer in np.argsort(-spread.max(1, initial=0.0), kind="stable"):
            options = measures[starts[layer] : ends[layer]]
            most = most + least[layer]
            partial = (partial[:, None] + options).reshape(-1, partial.shape[1])
            tried += len(partial)
            if tried > most_tried:
                raise _TooManyError
            kept = np.flatnonzero(np.all(partial @ lagrangian <= most, axis=1))
            if len(kept) > _MANY:
                kept = kept[_unbeaten(partial[kept])]
            partial = partial[kept]
            trail.append((int(layer), kept))
            if not len(kept):
                return None
        within = np.flatnonzero(np.all(partial[:, 1:] <= self.budgets + _ROUNDING, axis=1))
        if not len(within):
            return None
        state = int(within[np.argmin(partial[within, 0])])
        picks = np.empty(len(starts), dtype=np.int64)
        for layer, kept in reversed(trail):
            state, option = divmod(int(kept[state]), int(ends[layer] - starts[layer]))
            picks[layer] = core[starts[layer] + option]
        return picks

    def _branched(self, relaxed: _Relaxed) -> Indices | None:
        """Branch and cut among the options of least regret, more of them until none outside can be part of anything cheaper."""
        ascending = np.sort(relaxed.regrets)
        wanted = int(_CORE_PER_LAYER * (self.owners[-1] + 1))
        limit = float(ascending[min(wanted, len(ascending)) - 1])
        while True:
            core = np.flatnonzero(relaxed.regrets <= limit)
            found = self._only(core)._branch_and_cut()
            if len(core) == len(ascending):
                return found
            if found is None:
                limit = float(ascending[min(4 * len(core), len(ascending)) - 1])
                continue
            above = float(self.cost[core[found]].sum()) - relaxed.bound
            if above <= limit:
                return core[found]
            limit = above

    def _only(self, options: Indices) -> Knapsack:
        weights, ties = self.weights[:, options], self.ties[:, options]
        return Knapsack(self.cost[options], self.owners[options], weights, self.budgets, ties)

    def _relaxation(self) -> _Relaxed | None:
        """Bound and regrets hold for whatever prices of the budgets and ties: the tolerance of the linear solver does no harm."""
        equal, right = self._equalities()
        with _silent_stdout():
            result = linprog(self.cost, self.weights, self.budgets, equal, right, method="highs")  # type: ignore[call-overload]
        if result.x is None:
            return None
        prices = np.minimum(result.ineqlin.marginals, 0.0)
        tie_prices = result.eqlin.marginals[len(right) - self.ties.shape[0] :]
        reduced = self.cost - prices @ self.weights - self.ties.T @ tie_prices
        least = np.minimum.reduceat(reduced, _starts(self.owners))
        return _Relaxed(prices, float(least.sum() + prices @ self.budgets), reduced - least[self.owners])

    def _branch_and_cut(self) -> Indices | None:
        equal, right = self._equalities()
        rows = [LinearConstraint(equal, right, right)]
        if len(self.budgets):
            rows.append(LinearConstraint(self.weights, -np.inf, self.budgets))
        with _silent_stdout():
            result = milp(
                self.cost,
                integrality=np.ones(len(self.cost), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=rows,
                options={"mip_rel_gap": 0.0},
            )
        if result.x is None:
            return None
        starts = _starts(self.owners)
        return np.asarray([a + np.argmax(result.x[a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)])

    def _equalities(self) -> tuple[csr_array, Vector]:
        """One option of every layer; then the ties."""
        count = len(self.owners)
        layers = int(self.owners[-1]) + 1
        one = csr_array((np.ones(count), (self.owners, np.arange(count))), shape=(layers, count))
        return vstack([one, self.ties]), np.repeat((1.0, 0.0), (layers, self.ties.shape[0]))


def _starts(owners: Indices) -> Indices:
    """Where each layer's options begin."""
    return np.flatnonzero(np.diff(owners, prepend=-1))


def _unbeaten(partial: Matrix) -> Indices:
    """Of partial solutions (cost, and one or two weights) those that no other one equals or beats in all.

    With two weights a few that are beaten stay: each part of them, by the second weight, is held against all parts before, by the
    least cost up to each first weight.
    """
    if partial.shape[1] == 2:
        order = np.lexsort(partial.T)
        return order[_steps(partial[order, 0])]
    weights, costs = np.empty(0), np.empty(0)
    kept = []
    order = np.argsort(partial[:, 2], kind="stable")
    for part in np.array_split(order, math.isqrt(len(order))):
        at = np.searchsorted(weights, partial[part, 1], side="right") - 1
        part = part[(at < 0) | (np.append(costs, np.inf)[at] > partial[part, 0])]
        kept.append(part)
        weights, costs = np.append(weights, partial[part, 1]), np.append(costs, partial[part, 0])
        order = np.lexsort((costs, weights))
        order = order[_steps(costs[order])]
        weights, costs = weights[order], costs[order]
    return np.concatenate(kept)


def _steps(costs: Vector) -> Indices:
    """Where each is less than all before it."""
    return np.flatnonzero(np.diff(np.minimum.accumulate(costs), prepend=np.inf) < 0)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep what HiGHS prints from C (a stray debugging line in some versions) out of the program's output."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
