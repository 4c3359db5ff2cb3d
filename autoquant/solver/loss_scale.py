"""Scale predicted losses to what uniform plans were measured to lose. No torch.

The losses of layers are divergences. How they compare with what a limit is for, say the increase of
perplexity, differs: weights rounded to int4 may lose less of it than is predicted, and activations
rounded to float8 more. So each numerics has a factor of its own, learnt from the proven uniform
plan of these numerics. A mixed plan is solved for with losses in units of the limit then.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autoquant.records import Plan, Proof
from autoquant.solver.limits import Limits
from autoquant.solver.space import SearchSpace

_LARGEST_STEP = 4.0
"""A factor is at most so many times the usual one, or so many times less: a proof is noisy."""
_MOSTLY = 0.9
"""A uniform plan stands for numerics that this part of its predicted loss is of."""
_LOSES_SOMETHING = 0.25
"""Plans predicted to lose less than this part of what is allowed do not tell the usual factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """Turns predicted losses of layers into what their plans are expected to be measured to lose.

    Attributes:
        allowed: The plan loss, once scaled, that the limits of quality allow (None: no limit).
        factors: By numerics.
        usual: The factor of numerics of which no uniform plan was proven.
    """

    allowed: float | None
    factors: Mapping[str, float] = field(default_factory=dict)
    usual: float = 1.0

    def space(self, space: SearchSpace) -> SearchSpace:
        """Return the space with losses that are scaled where they are solved for."""
        return replace(space, factors=self.factors, usual_factor=self.usual)


def fit_loss_scale(
    space: SearchSpace, limits: Limits, plans: Mapping[str, Plan], proofs: Mapping[str, Proof]
) -> LossScale:
    """Learn the factors from the proven uniform plans, whose layers have predicted losses.

    Args:
        plans, proofs: By plan id.
    """
    allowed = limits.allowed_loss(logarithmic=space.logarithmic)
    loss_map = space.context.loss_map
    if allowed is None:
        return LossScale(allowed=None)
    ratios: dict[str, float] = {}
    telling: list[float] = []
    for plan_id, proof in proofs.items():
        share = limits.used(proof)
        known = _main_numerics(plans[plan_id]) if plan_id in plans else None
        if share is None or known is None:
            continue
        numerics, summed = known
        ratio = loss_map.summed(share * allowed) / summed if share > 0 else 0.0
        ratios[numerics] = ratio
        loses = loss_map.plan_loss(summed) > _LOSES_SOMETHING * allowed
        if loses and 0 < ratio < math.inf:
            telling.append(ratio)
    usual = statistics.median(telling) if telling else 1.0
    lowest, highest = usual / _LARGEST_STEP, usual * _LARGEST_STEP
    factors = {each: min(max(ratio, lowest), highest) for each, ratio in ratios.items()}
    return LossScale(allowed=allowed, factors=factors, usual=usual)


def _main_numerics(plan: Plan) -> tuple[str, float] | None:
    """Return the numerics that a uniform plan stands for, and its summed loss; None if none."""
    if plan.kind != "uniform":
        return None
    sums: dict[str, float] = {}
    for layer in plan.layers:
        sums[layer.numerics] = sums.get(layer.numerics, 0.0) + layer.loss
    numerics, most = max(sums.items(), key=lambda pair: pair[1])
    total = sum(sums.values())
    return (numerics, total) if total > 0 and most >= _MOSTLY * total else None
