"""Aim: solve again until the best plan just keeps to the measured limit of quality.

Losses were scaled to what uniform plans were measured to lose, see `loss_scale`. The first plan may
turn out beyond the limit, or well within it. Each further trial solves for the loss at which the
trials so far place the limit. Between the nearest trials on both sides that is regula falsi on the
logarithms of predicted loss and of the used share of the limit. While all trials are on one side,
the loss is scaled in proportion. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from autoquant.records import Plan, Proof
from autoquant.solver.limits import Limits
from autoquant.solver.planning import ProvenPlans
from autoquant.solver.space import SearchSpace
from autoquant.solver.ties import TIE_FRACTION

TRIALS = 3
"""At most this many plans are proven."""
CLOSE = 0.95
"""A plan that uses this share of the limit is close enough to it."""
# Between `CLOSE` and the limit, since a trial may miss it on either side.
_TARGET = 0.975
# Shares are divided by, and noise may make one 0 or less.
_LEAST_SHARE = 0.05
# A first plan is asked for these shares of the predicted loss that the limit allows.
_FIRST_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
# One noisy proof should not lead the next trial further than this.
_LARGEST_STEP = 4.0
# Losses that differ by less than this part were summed up in another order.
_SAME = 1e-6


@dataclass(frozen=True, slots=True)
class _Shot:
    """A plan's predicted loss, the measured share of the limit, and what is minimized."""

    loss: float
    share: float
    cost: float


def first_loss(
    space: SearchSpace, limits: Limits, allowed: float | None, *, only: bool = False
) -> float | None:
    """Return the predicted loss to solve for first; None if there is no limit of quality.

    A plan that is predicted to be at the limit is beyond it about as often as within. So it is the
    least share of what is allowed, and at least half, at which a plan costs no more than a tie.

    Args:
        allowed: The predicted loss that the limit is expected to allow.
        only: There is time for no second plan, so it is half, whatever the plan costs.
    """
    if allowed is None:
        return None
    if only:
        return _FIRST_SHARES[0] * allowed
    most = _solved_for(space, limits, allowed)
    if most is None:
        return allowed
    enough = _cost(most, limits) * (1 + TIE_FRACTION)
    for share in _FIRST_SHARES:
        plan = _solved_for(space, limits, share * allowed)
        if plan is not None and _cost(plan, limits) <= enough:
            return share * allowed
    return allowed


def _solved_for(space: SearchSpace, limits: Limits, loss: float, label: str = "") -> Plan | None:
    picks = space.solve(
        limits.minimize,
        max_summed_loss=space.budget(loss),
        max_memory_bytes=limits.max_memory_bytes,
    )
    return None if picks is None else space.plan(picks, label, "front")


def _cost(plan: Plan, limits: Limits) -> float:
    prediction = plan.prediction
    return prediction.request_ms if limits.minimize == "time" else float(prediction.memory_bytes)


def aimed(
    space: SearchSpace,
    *,
    limits: Limits,
    guess: float | None,
    known: ProvenPlans,
) -> Iterator[tuple[Plan, Callable[[Proof | None], None]]]:
    """Yield new plans nearer and nearer to the limit.

    With each plan comes a function that takes its proof (None: it could not be proven). It is to be
    called before the next plan is asked for. The plans end with one that uses 95 % of the limit,
    when nothing is left between the plans on both sides of it, or after three plans.

    Args:
        guess: The predicted loss that the limit is expected to allow (None: no limit of quality).
        known: Plans already proven, the one of the guess among them; they are not yielded.
    """
    shots: dict[str, _Shot] = {}
    proven: list[Proof | None] = []
    loss = guess
    while loss is not None:
        plan = _solved_for(space, limits, loss, f"front: aimed {len(shots) + 1}")
        if plan is None or plan.plan_id in shots:
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
        used = max(share, _LEAST_SHARE)
        shots[plan.plan_id] = _Shot(space.plan_loss(plan), used, _cost(plan, limits))
        loss = _next_loss(list(shots.values()))


def _next_loss(shots: Sequence[_Shot]) -> float | None:
    """Return the loss to solve for next; None if the limit is reached or nothing is gained."""
    # A plan that is predicted to lose nothing says nothing of how much another may lose.
    telling = [shot for shot in shots if shot.share <= 1 and shot.loss > 0]
    within = max(telling, key=lambda shot: shot.loss, default=None)
    beyond = min(
        (shot for shot in shots if shot.share > 1), key=lambda shot: shot.loss, default=None
    )
    if within is None or beyond is None:
        nearest = within or beyond
        if nearest is None:
            return None
        if CLOSE <= nearest.share <= 1:
            return None
        step = min(max(_TARGET / nearest.share, 1 / _LARGEST_STEP), _LARGEST_STEP)
        return nearest.loss * step
    if within.share >= CLOSE or within.cost <= beyond.cost * (1 + TIE_FRACTION):
        return None
    if beyond.loss <= within.loss * (1 + _SAME):  # what was measured contradicts the predictions
        return None
    # A straight line through both, in logarithms, tells the loss at the target.
    slope = math.log(beyond.share / within.share) / math.log(beyond.loss / within.loss)
    return within.loss * math.exp(math.log(_TARGET / within.share) / slope)
