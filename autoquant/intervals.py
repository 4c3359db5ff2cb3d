"""Estimates with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoquant.records import Interval

CONFIDENCE = 0.95


def paired_increase(
    losses: Sequence[float], reference: Sequence[float], *, logarithmic: bool, unseen: int = 0
) -> Interval:
    """Relative increase of a plan over the unquantized model, from losses of the same samples.

    Args:
        losses: One mean loss per sample (window), of the plan.
        reference: The same samples under the unquantized model.
        logarithmic: The losses are log-likelihoods, and the increase is that of perplexity: exp(mean difference) - 1. Otherwise
            it is mean difference over mean reference; over 1 where that is 0, as for divergence.
        unseen: The interval is that of the mean of so many further samples, which have chance of their own; 0: of the mean over
            all there could be.

    Returns:
        The increase as a fraction with its 95 % interval, from Student's t of the paired differences.
    """
    if len(losses) != len(reference) or not losses:
        raise ValueError(f"{len(losses)} losses for {len(reference)} reference losses")
    mean, half = _mean_and_half([a - b for a, b in zip(losses, reference, strict=True)], unseen)
    if logarithmic:
        return Interval(value=math.expm1(mean), low=math.expm1(mean - half), high=_expm1(mean + half))
    scale = abs(math.fsum(reference) / len(reference)) or 1.0
    return Interval(value=mean / scale, low=(mean - half) / scale, high=(mean + half) / scale)


def mean_interval(samples: Sequence[float], unseen: int = 0) -> Interval:
    """Mean of samples with its 95 % interval, from Student's t; `unseen` as for `paired_increase`."""
    mean, half = _mean_and_half(samples, unseen)
    return Interval(value=mean, low=mean - half, high=mean + half)


def _mean_and_half(samples: Sequence[float], unseen: int) -> tuple[float, float]:
    """The mean, and half the length of its interval (infinite for a single sample)."""
    from scipy.stats import t as student

    count = len(samples)
    mean = math.fsum(samples) / count
    if count == 1:
        return mean, math.inf
    spread = 1 / count + (1 / unseen if unseen else 0.0)
    variance = math.fsum((sample - mean) ** 2 for sample in samples) / (count - 1)
    return mean, float(student.ppf(0.5 + CONFIDENCE / 2, count - 1)) * math.sqrt(variance * spread)


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 700 else math.inf
