"""Means with their intervals, of 95 % unless asked for another confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoquant.records import Interval

CONFIDENCE = 0.95


def paired_increase(
    losses: Sequence[float],
    reference: Sequence[float],
    *,
    logarithmic: bool,
    unseen: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return a plan's relative increase in loss over the unquantized model.

    Args:
        losses: The plan's mean loss on each sample (window).
        reference: The unquantized model's losses on the same samples.
        logarithmic: The losses are log-likelihoods, and the increase is that of perplexity:
            exp(mean difference) - 1. Otherwise the mean difference is divided by the mean
            reference, or by 1 if that is 0 (as for divergence).
        unseen: Number of further samples whose mean the interval should cover. 0 is for the mean
            over all possible samples.
        confidence: The chance that the interval holds what it is for.

    Returns:
        The increase as a fraction. Its interval comes from Student's t of the paired
        differences.
    """
    if len(losses) != len(reference) or not losses:
        raise ValueError(f"{len(losses)} losses for {len(reference)} reference losses")
    differences = [loss - other for loss, other in zip(losses, reference, strict=True)]
    mean, half = _mean_and_half(differences, unseen, confidence)
    if logarithmic:
        return Interval(
            value=math.expm1(mean), low=math.expm1(mean - half), high=_expm1(mean + half)
        )
    scale = abs(math.fsum(reference) / len(reference)) or 1.0
    return Interval(value=mean / scale, low=(mean - half) / scale, high=(mean + half) / scale)


def mean_interval(
    samples: Sequence[float], unseen: int = 0, *, confidence: float = CONFIDENCE
) -> Interval:
    """Return the mean of samples with its interval, from Student's t.

    Args:
        unseen, confidence: As for `paired_increase`.
    """
    mean, half = _mean_and_half(samples, unseen, confidence)
    return Interval(value=mean, low=mean - half, high=mean + half)


def _mean_and_half(samples: Sequence[float], unseen: int, confidence: float) -> tuple[float, float]:
    """Return the mean and half the length of its interval, infinite for a single sample."""
    from scipy.stats import t as student

    count = len(samples)
    mean = math.fsum(samples) / count
    if count == 1:
        return mean, math.inf
    spread = 1 / count + (1 / unseen if unseen else 0.0)
    variance = math.fsum((sample - mean) ** 2 for sample in samples) / (count - 1)
    deviations = float(student.ppf(0.5 + confidence / 2, count - 1))
    return mean, deviations * math.sqrt(variance * spread)


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 700 else math.inf
