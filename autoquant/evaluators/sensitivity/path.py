"""Path integral: each layer's share of the divergence of a model with all layers changed.

Let every linear compute (1 - t) y + t y', where y is its unquantized output and y' the changed one,
and let F(t) be the divergence of that model. The integral of dF/dy_i . (y'_i - y_i) over t from 0
to 1 is layer i's share of F(1), and the shares sum to F(1) (Aumann and Shapley, "Values of
Non-Atomic Games", 1974; as integrated gradients in Sundararajan et al., 2017). A share includes how
other layers' errors act together with the layer's, which measuring it alone leaves out.

A mixed plan changes the other layers less than the uniform model at t = 1 does, so shares of that
model are too large for it. So the integral ends at `REACH`, and is divided by `REACH` squared,
because a divergence of second order grows like that. Each numerics costs one forward and backward
pass for each of the `POINTS` (Gauss-Legendre, where one is already exact to second order).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.outputs import AnyQuality
from autoquant.evaluators.sensitivity.base import (
    EVERY_LAYER,
    Change,
    OnScored,
    Sensitivity,
    check_text,
)
from autoquant.evaluators.sensitivity.gradients import backpropagate_each, scoring_products
from autoquant.evaluators.sensitivity.together import (
    CalibrationModel,
    PathSite,
    by_numerics,
    dtypes_of,
)

REACH = 0.7
POINTS = 1


def path_losses(
    module: nn.Module, changes: Sequence[Change], quality: AnyQuality, on_scored: OnScored
) -> None:
    """Score the changes of each numerics in turn, and the numerics in all layers."""
    text = check_text(quality, PATH.id)
    dtypes = dtypes_of(module, changes)
    with torch.no_grad(), in_float32(module), scoring_products(module):
        calibration = CalibrationModel(module, text)
        for numerics, of in by_numerics(changes).items():
            sites = calibration.sites(of, dtypes)
            shares = path_shares(calibration, sites)
            losses = {(name, numerics): share for name, share in shares.items()}
            on_scored(numerics, losses | {(EVERY_LAYER, numerics): calibration.whole(sites)})


def path_shares(
    calibration: CalibrationModel,
    sites: Sequence[PathSite],
    *,
    reach: float = REACH,
    points: int = POINTS,
) -> dict[str, float]:
    """Return each site's share of the mean divergence per token in nats, by its name."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    total = torch.zeros(len(sites), device=calibration.device)
    for node, weight in zip(nodes, weights, strict=True):
        for site in sites:
            site.stand_at(reach * (float(node) + 1) / 2)
        backpropagate_each(
            calibration.module,
            calibration.batches,
            sites,
            lambda number: partial(divergence_gradient, calibration.reference(number)),
        )
        total += float(weight) / 2 / reach * torch.stack([site.inner for site in sites])
    shares = (total / calibration.rows).tolist()
    return {site.name: max(share, 0.0) for site, share in zip(sites, shares, strict=True)}


def divergence_gradient(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the summed KL(reference || logits) with respect to the logits."""
    return (logits.float().softmax(-1) - reference.float().softmax(-1)).to(logits.dtype)


PATH = Sensitivity(
    id="path",
    version="path-2",
    score=path_losses,
    together=True,
    functions=False,
    description=(
        "each layer's share where all layers are changed part of the way, from gradients of the "
        "true divergence"
    ),
)
