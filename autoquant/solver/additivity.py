"""From the summed losses of layers to the loss of a plan: they do not simply add up. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Of the curvature, times the largest sum: the plan loss is at most 21 times that sum then.
_STEEPEST = 20.0


@dataclass(frozen=True, slots=True)
class LossMap:
    """Maps the layers' summed loss s to the plan loss s + curvature s^2.

    Errors make one another worse until there is little left to lose. With a negative curvature the
    plan loss saturates instead: s / (1 + |curvature| s), the same to second order.

    Attributes:
        curvature: Per nat (or unit of the user's own loss); 0 is plain addition.
    """

    curvature: float = 0.0

    def plan_loss(self, summed: float) -> float:
        """Return the loss predicted for a plan whose layers' losses sum to `summed`."""
        if self.curvature >= 0:
            return summed * (1 + self.curvature * summed)
        return summed / (1 - self.curvature * summed)

    def summed(self, plan_loss: float) -> float:
        """Return the sum that `plan_loss` is predicted from; infinite if none is."""
        if self.curvature == 0:
            return plan_loss
        if self.curvature > 0:
            return (math.sqrt(1 + 4 * self.curvature * plan_loss) - 1) / (2 * self.curvature)
        rest = 1 + self.curvature * plan_loss
        return plan_loss / rest if rest > 0 else math.inf


ADDITION = LossMap()
"""The plan loss is the sum."""


def fit_loss_map(pairs: Sequence[tuple[float, float]]) -> LossMap:
    """Fit the map with the least squared error of log loss.

    Args:
        pairs: (sum of the layers' losses, measured loss of all of them together). Pairs that are
            not positive are ignored; without any other the losses are added.
    """
    from scipy.optimize import minimize_scalar

    known = [pair for pair in pairs if min(pair) > 0]
    if not known:
        return ADDITION
    summed, measured = np.array(known, dtype=np.float64).T

    def error(curvature: float) -> float:
        loss_map = LossMap(curvature)
        predicted = np.array([loss_map.plan_loss(s) for s in summed])
        return float(np.square(np.log(predicted / measured)).sum())

    steepest = _STEEPEST / float(summed.max())
    best = minimize_scalar(
        error, bounds=(-steepest, steepest), method="bounded", options={"xatol": 1e-6 * steepest}
    )
    return LossMap(float(best.x))


def together_pairs(
    losses: Mapping[tuple[str, str], float], every_layer: str
) -> list[tuple[float, float]]:
    """Return (sum of the layers' losses, measured loss of all at once) for each numerics.

    Args:
        losses: By (layer, numerics).
        every_layer: The layer name of the measurements of all layers at once.
    """
    sums: dict[str, float] = {}
    for (layer, numerics), loss in losses.items():
        if layer != every_layer:
            sums[numerics] = sums.get(numerics, 0.0) + loss
    return [
        (sums.get(numerics, 0.0), loss)
        for (layer, numerics), loss in losses.items()
        if layer == every_layer
    ]
