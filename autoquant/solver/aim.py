"""Aim: solve again until the fastest (or smallest) plan just keeps to the limit of quality as it is measured.

What loss the limit allows is first guessed from uniform plans, see `Limits.expected_loss`; the plan solved for that may turn out
beyond the limit, or well within it. Each trial solves for the loss at which the trials before say that the limit lies: between
the nearest on both sides by regula falsi on the logarithms of predicted loss and of the used share of the limit, or, as long as
all are on one side, in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autoquant.records import LayerChoice, Plan, Proof
from autoquant.solver.limits import Limits
from autoquant.solver.planning import PlanContext, least, make_problem, plan_of
from autoquant.solver.ties import TIE_FRACTION

TRIALS = 3
"""So many plans are proven at most."""
CLOSE = 0.95
"""A plan that uses so much of the limit is at it."""
_TARGET = 0.975
_LEAST_SHARE = 0.05
_LARGEST_STEP = 4.0


@dataclass(frozen=True, slots=True)
class _Shot:
    """A plan's predicted loss, the share of the limit that it was measured to use, and what is minimized."""

    loss: float
    share: float
    cost: float


def aimed(
    options: Sequence[Sequence[LayerChoice]],
    context: PlanContext,
    *,
    limits: Limits,
    guess: float | None,
    known: Mapping[str, tuple[Plan, Proof]],
) -> Iterator[tuple[Plan, Callable[[Proof | None], None]]]:
    """New plans nearer and nearer to the limit, each with a function that takes its proof (None: it could not be proven).

    Args:
        guess: The predicted loss that the limit is expected to allow; None where there is no limit of quality.
        known: Plans already proven, by id: what is not proven again, and among them the plan of the guess.

    Ends with a plan that uses 95 % of the limit, where nothing is left between the plans on its two sides, and after three plans.
    """
    problem = make_problem(options, context.workload, context.bound.groups)
    shots: dict[str, _Shot] = {}
    proven: list[Proof | None] = []
    loss = guess
    while loss is not None:
        summed = context.loss_map.summed(loss)
        picks = least(problem, context, limits.minimize, max_loss=summed, max_memory_bytes=limits.max_memory_bytes)
        if picks is None:
            return
        plan = plan_of(options, picks, f"front: aimed {len(shots) + 1}", "front", context)
        if plan.plan_id in shots:
            return
        proof = known[plan.plan_id][1] if plan.plan_id in known else None
        if proof is None:
            if len(proven) == TRIALS:
                return
            yield plan, proven.append
            proof = proven[-1]
        share = limits.used(proof) if proof else None
        if share is None:
            return
        cost = plan.prediction.request_ms if limits.minimize == "time" else float(plan.prediction.memory_bytes)
        shots[plan.plan_id] = _Shot(plan.prediction.loss, max(share, _LEAST_SHARE), cost)
        loss = _next_loss(list(shots.values()))


def _next_loss(shots: Sequence[_Shot]) -> float | None:
    """The predicted loss to solve for next, or None where the limit is reached, or what is left to it brings nothing."""
    within = max((shot for shot in shots if shot.share <= 1), key=lambda shot: shot.loss, default=None)
    beyond = min((shot for shot in shots if shot.share > 1), key=lambda shot: shot.loss, default=None)
    if within is None or beyond is None:
        nearest = within or beyond
        assert nearest is not None
        if CLOSE <= nearest.share <= 1:
            return None
        step = min(max(_TARGET / nearest.share, 1 / _LARGEST_STEP), _LARGEST_STEP)
        return nearest.loss * step
    if within.share >= CLOSE or within.cost <= beyond.cost * (1 + TIE_FRACTION):
        return None
    slope = math.log(beyond.share / within.share) / math.log(beyond.loss / within.loss)
    return within.loss * math.exp(math.log(_TARGET / within.share) / slope)
