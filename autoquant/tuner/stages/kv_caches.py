"""The stage that proves plans with keys and values in 8 bits.

It is one choice for the whole model, so it takes no part in the solver's choice for each layer. The
best plan of the search is proven again with each format. If that loses too much, so is the fastest
plan that leaves as much of the limit as the format took there.
"""

from __future__ import annotations

from dataclasses import replace

from autoquant.events import Notice, StageFinished, StageStarted
from autoquant.models import LoadedModel
from autoquant.records import KV_CACHES, KvCache, Plan, Proof
from autoquant.runtime.generate.kv_codes import kv_cache_unsupported
from autoquant.solver.limits import Limits
from autoquant.solver.planning import with_kv_cache
from autoquant.study.columns import request_times
from autoquant.tuner.ledger import ProofLedger

KV_CACHE_AUTO = "auto"
"""What a user says for every format that the device has."""
_MOST_PLANS = 2
"""With each format."""


def proofs_of_kv_caches(asked: str, loaded: LoadedModel) -> int:
    """Return how many proofs the stage makes at least, if there is time: one for each format."""
    return len(_kinds(asked, loaded))


def prove_kv_caches(asked: str, loaded: LoadedModel, ledger: ProofLedger, limits: Limits) -> None:
    """Prove the best plan with keys and values in each format that was asked for.

    Args:
        asked: A format, or `auto`.
    """
    kinds = _kinds(asked, loaded)
    ledger.listener(StageStarted("kv cache", len(kinds)))
    proven = [label for kind in kinds for label in _prove(kind, ledger, limits)]
    words = ", ".join(proven) or "none proven"
    ledger.listener(StageFinished("kv cache", words))


def _kinds(asked: str, loaded: LoadedModel) -> list[KvCache]:
    """Return the formats that were asked for and that the device has."""
    return [
        kind
        for kind in KV_CACHES
        if asked in (kind, KV_CACHE_AUTO) and not kv_cache_unsupported(loaded.device, kind)
    ]


def _prove(kind: KvCache, ledger: ProofLedger, limits: Limits) -> list[str]:
    """Return the labels of the plans that were proven with a format."""
    labels: list[str] = []
    base = _best_without(ledger, limits)
    while base is not None and len(labels) < _MOST_PLANS:
        plan = with_kv_cache(base, kind)
        if not ledger.prove_if_time(plan):
            text = f"{plan.label} not proven, for want of time; a longer --time-budget proves it"
            ledger.listener(Notice(text))
            break
        proof = ledger.proofs.get(plan.plan_id)
        if proof is None:
            break
        labels.append(plan.label)
        if limits.within(proof, plan):
            break
        base = _best_without(ledger, _tighter(limits, proof, ledger.proofs[base.plan_id]))
    return labels


def _best_without(ledger: ProofLedger, limits: Limits) -> Plan | None:
    """Return the best plan within limits whose keys and values are in the model's dtype."""
    times = request_times(ledger.proofs.values())
    within = [
        proof
        for plan_id, proof in ledger.proofs.items()
        if ledger.plans[plan_id].kv_cache is None
        and ledger.study.constraints.allow(ledger.plans[plan_id])
        and limits.within(proof, ledger.plans[plan_id])
    ]

    def cost(proof: Proof) -> float:
        return times[proof.plan_id] if limits.minimize == "time" else proof.memory_bytes

    best = min(within, key=cost, default=None)
    return None if best is None else ledger.plans[best.plan_id]


def _tighter(limits: Limits, proof: Proof, base: Proof) -> Limits:
    """Return limits that leave room for what a format lost, beside its plan without it."""
    took = proof.selection_increase.high - base.selection_increase.high
    most, most_kl = limits.max_ppl_increase, limits.max_kl
    if most is not None:
        most -= max(took, 0.0)
    if most_kl is not None and proof.selection_kl and base.selection_kl:
        most_kl -= max(proof.selection_kl.high - base.selection_kl.high, 0.0)
    return replace(limits, max_ppl_increase=most, max_kl=most_kl)
