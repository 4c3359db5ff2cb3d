"""Tell early that a plan is beyond the limits of quality, with the error of that controlled.

A plan is looked at a few times while its windows are compared. The windows so far give an interval
for the mean of the others (Student's t, as in `paired_increase`). Where that is beyond the limit,
so is the mean of all windows. Over all looks together, a plan within the limit is stopped with a
chance of at most `ERROR` (Bonferroni's inequality).
"""

from __future__ import annotations

from collections.abc import Sequence

from autoquant.intervals import mean_interval, paired_increase
from autoquant.solver.limits import Limits

ERROR = 0.001
_SHARES = (8, 4, 2)
"""A look comes after an eighth, a quarter and half of all windows."""


def looks(samples: int, least: int) -> frozenset[int]:
    """Return the numbers of samples after which to look, none below `least`."""
    after = {max(least, samples // share) for share in _SHARES}
    return frozenset(number for number in after if number < samples)


def surely_beyond(
    limits: Limits,
    losses: Sequence[float],
    reference: Sequence[float],
    divergences: Sequence[float],
    *,
    logarithmic: bool,
    unseen: int,
) -> bool:
    """Check whether the samples so far leave no doubt that a plan is beyond a limit of quality.

    Args:
        losses, reference: The plan's and the unquantized model's loss on each sample.
        divergences: The divergence of each sample, or empty if it is not defined.
        logarithmic: As in `paired_increase`.
        unseen: The number of samples that were not compared yet.
    """
    confidence = 1 - 2 * ERROR / len(_SHARES)
    bounds = []
    if limits.max_ppl_increase is not None:
        increase = paired_increase(
            losses, reference, logarithmic=logarithmic, unseen=unseen, confidence=confidence
        )
        bounds.append((increase, limits.max_ppl_increase))
    if limits.max_kl is not None and divergences:
        bounds.append((mean_interval(divergences, unseen, confidence=confidence), limits.max_kl))
    return any(interval.low > limit for interval, limit in bounds)
