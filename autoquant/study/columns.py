"""The columns of a study's table of plans, and how they are computed. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median_high
from typing import Any

import numpy as np

from autoquant.records import RIGHT, Delivery, Measure, Proof
from autoquant.solver.dominance import undominated
from autoquant.solver.limits import Limits

COLUMNS = (
    "plan_id",
    "label",
    "kind",
    "predicted_request_ms",
    "measured_request_ms",
    "speedup",
    "perplexity",
    "perplexity_increase",
    "perplexity_increase_low",
    "perplexity_increase_high",
    "kl",
    "accuracy",
    "memory_bytes",
    "kv_cache",
    "kv_cache_bytes",
    "on_front",
    "within_limits",
    "recommended",
    "ties",
    "measure",
    "as_run_loop",
    "as_run_where",
    "as_run_request_ms",
    "as_run_original_request_ms",
    "as_run_speedup",
    "as_run_speedup_low",
    "as_run_speedup_high",
    "as_run_first_token_ms",
    "as_run_original_first_token_ms",
    "as_run_step_ms",
    "as_run_original_step_ms",
    "as_run_notes",
    "not_recommended",
)


def request_times(proofs: Iterable[Proof]) -> dict[str, float]:
    """Return request milliseconds by plan id, without the machine's drift between proofs.

    Each proof timed its plan and the unquantized model in turn. The ratio of both is applied to the
    median of the unquantized model's times.
    """
    proofs = list(proofs)
    original_ms = original_request_ms(proofs)
    return {
        proof.plan_id: proof.request_ms / proof.original_request_ms * original_ms
        for proof in proofs
    }


def measure_of(proof: Proof, limits: Limits) -> Measure:
    """Return the measure of a plan's quality."""
    if limits.measure == "divergence":
        return "divergence"
    return "loss" if proof.perplexity is None else "perplexity"


def accuracy_of(proof: Proof) -> float | None:
    """Return the share of labels that a plan gets right, 0 to 1; None without labels."""
    note = next((note for note in proof.notes if note.startswith(RIGHT)), None)
    return None if note is None else float(note.removeprefix(RIGHT).partition("%")[0]) / 100


def original_request_ms(proofs: Iterable[Proof]) -> float:
    """Return the median of the unquantized model's request times; 0 without proofs."""
    originals = [proof.original_request_ms for proof in proofs]
    return median_high(originals) if originals else 0.0


def as_run_columns(delivery: Delivery | None) -> dict[str, Any]:
    """Return the columns of how a plan runs for its user, each None if that is not known."""
    names = [name for name in COLUMNS if name.startswith("as_run_")]
    if (
        delivery is None
        or delivery.times is None
        or delivery.original_times is None
        or delivery.ratio is None
    ):
        return dict.fromkeys(names)
    times, original, ratio = delivery.times, delivery.original_times, delivery.ratio
    values = (
        delivery.loop,
        delivery.where,
        times.request_ms,
        original.request_ms,
        1 / ratio.value,
        1 / ratio.high,
        1 / ratio.low if ratio.low > 0 else math.inf,
        times.first_token_ms,
        original.first_token_ms,
        times.step_ms,
        original.step_ms,
        "; ".join(delivery.notes),
    )
    return dict(zip(names, values, strict=True))


def plans_on_front(proofs: Mapping[str, Proof], times: Mapping[str, float]) -> set[str]:
    """Return the ids of plans that no other beats in request time, quality and memory at once."""
    if not proofs:
        return set()
    points = [
        (
            times[plan_id],
            proof.increase.value if proof.perplexity is None else proof.perplexity,
            proof.memory_bytes,
        )
        for plan_id, proof in proofs.items()
    ]
    plan_ids = list(proofs)
    return {plan_ids[i] for i in undominated(np.asarray(points, dtype=np.float64))}
