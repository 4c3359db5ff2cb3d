"""Find which proven plans differ by no more than noise. No torch.

Two plans are a tie if neither speed nor quality distinguishes them. Their request times then differ
by less than the spread of the rounds that they were timed in. And the 95 % interval of the
difference of their losses, sample by sample on the selection part, contains 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autoquant.intervals import mean_interval
from autoquant.records import Proof

TIE_FRACTION = 0.01
"""Request times (or bytes) closer than this are always a tie."""
LARGEST_TIE = 0.05
"""Farther apart they are never a tie, however noisy the clock was."""


def tied(a: Proof, b: Proof) -> bool:
    """Check whether two proven plans of a study differ by no more than noise."""
    return same_speed(a, b) and same_quality(a, b)


def ties(proofs: Mapping[str, Proof]) -> dict[str, list[str]]:
    """Return for each plan id the ids of the plans that it is a tie with."""
    found: dict[str, list[str]] = {plan_id: [] for plan_id in proofs}
    order = list(proofs)
    for number, one in enumerate(order):
        for other in order[number + 1 :]:
            if tied(proofs[one], proofs[other]):
                found[one].append(other)
                found[other].append(one)
    return found


def same_speed(a: Proof, b: Proof) -> bool:
    """Check whether request times differ by no more than their spread.

    Each counts relative to the unquantized model, which was timed in turn with it.

    From 1 % (below which it is always so) to 5 % (above which it never is).
    """
    ratios = [proof.request_ms / proof.original_request_ms for proof in (a, b)]
    faster = min(ratios)
    noise = math.hypot(_half(a), _half(b)) / faster
    allowed = min(max(noise, TIE_FRACTION), LARGEST_TIE)
    return abs(ratios[0] - ratios[1]) <= faster * allowed


def same_quality(a: Proof, b: Proof) -> bool:
    """Check whether the paired interval of the difference of losses contains 0.

    It is of the samples that both were measured on: the first ones, or all. False if the losses of
    a plan are not known.
    """
    both = zip(a.selection_losses, b.selection_losses, strict=False)
    differences = [x - y for x, y in both]
    if len(differences) < 2:
        return False
    interval = mean_interval(differences)
    return interval.low <= 0 <= interval.high


def preferred(best: Proof, rivals: Sequence[Proof]) -> Proof:
    """Return the best plan, or a rival that ties with it and diverges clearly less.

    Divergence separates plans that perplexity cannot; clearly less means that the intervals do not
    overlap. Without divergences, the smallest plan wins if it is smaller by more than 1 %.
    """
    if best.selection_kl is None:
        smallest = min((best, *rivals), key=lambda proof: proof.memory_bytes)
        return smallest if smallest.memory_bytes < best.memory_bytes * (1 - TIE_FRACTION) else best
    lowest = best.selection_kl.low
    chosen, least = best, math.inf
    for rival in rivals:
        kl = rival.selection_kl
        if kl is not None and kl.high < lowest and kl.value < least:
            chosen, least = rival, kl.value
    return chosen


def _half(proof: Proof) -> float:
    if proof.time_ratio is None:
        return 0.0
    half = proof.time_ratio.high - proof.time_ratio.value
    return half if math.isfinite(half) else 0.0
