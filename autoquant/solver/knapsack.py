"""Solve the multiple-choice knapsack problem exactly: one option per layer, least cost, budgets.

The linear relaxation bounds the least cost from below. Its duals give every option a regret: how
much a solution with that option lies at least above the bound. All solutions within some limit
above the bound consist of options whose regret is within that limit. These options are enumerated
layer by layer, those that weigh most first. A partial solution is dropped if Lagrangian bounds of
the rest show that it cannot end within limit and budgets, or if another one beats it. The best
solution that is left is optimal. If none is left, the limit is raised; if there are too many, it is
raised by less. See Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapter 11, for
regrets, the core and dominance; two budgets need several multipliers here.

If ties bind layers together, or too many options are left, those within a limit go to the branch
and cut of HiGHS (https://highs.dev), until what it finds is within that limit.
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
# Multipliers of the Lagrangian bounds, relative to the duals.
_MULTIPLES = (0.7, 0.85, 1.0, 1.2, 1.4)
# The first limit above the relaxation, relative to what a solution costs at most.
_FIRST_LIMIT = 1e-6
# How many partial solutions are tried under one limit, and by which factor the limit is raised.
_EFFORTS = ((20_000, 1.5), (200_000, 1.1), (2_000_000, 1.05))
# The limit is not raised any further within this factor of one that was too much.
_CLOSE = 1.02
# With more partial solutions than these, those that others beat are dropped.
_MANY = 200
# How many options of each layer the first branch and cut gets.
_CORE_PER_LAYER = 1.3
# The same sum in another order may differ by this much.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """The linear relaxation.

    Attributes:
        prices: The worth of a unit of each budget, never positive.
        bound: No solution costs less.
        regrets: By how much a solution with the option lies at least above the bound.
    """

    prices: Vector
    bound: float
    regrets: Vector


class _TooManyError(Exception):
    """More partial solutions than are worth keeping."""


@dataclass(frozen=True, slots=True)
class Knapsack:
    """Minimize `cost @ x` over x of 0 and 1.

    Of each layer one option is taken; `weights @ x <= budgets` and `ties @ x = 0`.

    Attributes:
        cost: Of each option, in units of what a solution costs at most.
        owners: The layer of each option, ascending; every layer has at least one.
        weights: A row for each budget.
        ties: A row for each tie.
    """

    cost: Vector
    owners: Indices
    weights: Matrix
    budgets: Vector
    ties: csr_array

    def least(self) -> Indices | None:
        """Return the option of each layer in a solution of least cost, or None."""
        relaxed = self._relaxation()
        if relaxed is None:
            return None
        if self.ties.shape[0]:
            return self._branched(relaxed)
        # Limits above the bound. The first holds no solution, the second the best one found.
        nothing, something = _FIRST_LIMIT, math.inf
        for most_tried, growth in _EFFORTS:
            too_many = math.inf
            while nothing * _CLOSE < too_many:
                limit = something
                if something >= too_many:
                    # Raised by a factor, but not past the middle between too little and too much.
                    limit = min(nothing * growth, math.sqrt(nothing * too_many))
                try:
                    found = self._enumerated(relaxed, limit, most_tried)
                except _TooManyError:
                    too_many = limit
                else:
                    above = math.inf
                    if found is not None:
                        above = float(self.cost[found].sum()) - relaxed.bound
                    # A limit above the cost of all options left none out: there is no other one.
                    if above <= limit + _ROUNDING or limit > len(self.cost):
                        return found
                    nothing, something = limit, min(something, above)
        return self._branched(relaxed)

    def _enumerated(self, relaxed: _Relaxed, limit: float, most_tried: int) -> Indices | None:
        """Return the best solution that costs at most bound and limit.

        None if there is none; at times a more expensive one is found then.

        Raises:
            _TooManyError: There are too many partial solutions.
        """
        core = np.flatnonzero(relaxed.regrets <= limit)
        # A row for each option: its cost, then its weights.
        measures = np.vstack((self.cost, self.weights))[:, core].T
        # A row for each choice of multipliers: cost less prices @ weights.
        prices = (
            np.array(list(itertools.product(_MULTIPLES, repeat=len(self.budgets)))) * relaxed.prices
        )
        lagrangian = np.vstack((np.ones(len(prices)), -prices.T))
        starts = _starts(self.owners[core])
        # By layer and multipliers, the least that any option adds; `most` is what may be added.
        least = np.minimum.reduceat(measures @ lagrangian, starts)
        most = relaxed.bound + limit + _ROUNDING - prices @ self.budgets - least.sum(0)
        ends = np.append(starts[1:], len(core))
        partial = np.zeros((1, measures.shape[1]))
        trail: list[tuple[int, Indices]] = []
        tried = 0
        # Layers whose weights differ most come first: they decide early what breaks a budget.
        weights = measures[:, 1:]
        spread = np.maximum.reduceat(weights, starts) - np.minimum.reduceat(weights, starts)
        for layer in np.argsort(-spread.max(1, initial=0.0), kind="stable"):
            options = measures[starts[layer] : ends[layer]]
            # What follows adds at least its `least`, and this layer is no longer among it.
            most = most + least[layer]
            # Every partial solution with every option of this layer.
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
        # Walk back from the cheapest solution: each kept index encodes its parent and its option.
        state = int(within[np.argmin(partial[within, 0])])
        picks = np.empty(len(starts), dtype=np.int64)
        for layer, kept in reversed(trail):
            state, option = divmod(int(kept[state]), int(ends[layer] - starts[layer]))
            picks[layer] = core[starts[layer] + option]
        return picks

    def _branched(self, relaxed: _Relaxed) -> Indices | None:
        """Branch and cut among the options of least regret.

        More options are taken until none outside can be part of a cheaper solution.
        """
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
        """Solve the linear relaxation.

        Bound and regrets hold for any prices, so the tolerance of the linear solver does no harm.
        """
        equal, right = self._equalities()
        with _silent_stdout():
            result = linprog(self.cost, self.weights, self.budgets, equal, right, method="highs")  # type: ignore[call-overload]
        if result.x is None:
            return None
        prices = np.minimum(result.ineqlin.marginals, 0.0)
        tie_prices = result.eqlin.marginals[len(right) - self.ties.shape[0] :]
        reduced = self.cost - prices @ self.weights - self.ties.T @ tie_prices
        least = np.minimum.reduceat(reduced, _starts(self.owners))
        return _Relaxed(
            prices, float(least.sum() + prices @ self.budgets), reduced - least[self.owners]
        )

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
        picks = []
        for start, of_layer in zip(starts, np.split(result.x, starts[1:]), strict=True):
            # HiGHS returns whole numbers up to a tolerance.
            picks.append(start + np.argmax(of_layer))
        return np.asarray(picks)

    def _equalities(self) -> tuple[csr_array, Vector]:
        """Return the constraints with `=`: one option of every layer, then the ties."""
        options = len(self.owners)
        layers = int(self.owners[-1]) + 1
        # A row for each layer, with a 1 in the columns of its options. These add up to 1.
        cells = (self.owners, np.arange(options))
        one = csr_array((np.ones(options), cells), shape=(layers, options))
        # What is tied is picked together: the difference is 0.
        right = np.repeat((1.0, 0.0), (layers, self.ties.shape[0]))
        return vstack([one, self.ties]), right


def _starts(owners: Indices) -> Indices:
    """Return where each layer's options begin."""
    return np.flatnonzero(np.diff(owners, prepend=-1))


def _unbeaten(partial: Matrix) -> Indices:
    """Return the partial solutions that no other one equals or beats in cost and weights.

    There are too many to compare pairwise (as `autoquant.solver.dominance` does), so they are
    swept. With two weights some that are beaten stay: they are sorted by the second weight and
    split, and each part is compared with the parts before by the least cost up to each first
    weight.
    """
    if partial.shape[1] == 2:
        # By weight, then cost: what costs no less than one before it is beaten.
        order = np.lexsort(partial.T)
        return order[_steps(partial[order, 0])]
    weights, costs = np.empty(0), np.empty(0)
    kept = []
    order = np.argsort(partial[:, 2], kind="stable")
    for part in np.array_split(order, math.isqrt(len(order))):
        at = np.searchsorted(weights, partial[part, 1], side="right") - 1
        # Before the first weight (-1) stands infinity, which is last.
        part = part[np.concatenate((costs, [np.inf]))[at] > partial[part, 0]]
        kept.append(part)
        weights = np.concatenate((weights, partial[part, 1]))
        costs = np.concatenate((costs, partial[part, 0]))
        order = np.lexsort((costs, weights))
        order = order[_steps(costs[order])]
        weights, costs = weights[order], costs[order]
    return np.concatenate(kept)


def _steps(costs: Vector) -> Indices:
    """Return where each cost is less than all before it."""
    before = np.concatenate(([np.inf], np.minimum.accumulate(costs)[:-1]))
    return np.flatnonzero(costs < before)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Silence HiGHS, which prints a debug line from C in some versions."""
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
