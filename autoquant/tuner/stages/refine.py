"""The refine stage: what is left of the time goes to plans that Optuna proposes."""

from __future__ import annotations

from autoquant.events import StageFinished, StageProgress, StageStarted
from autoquant.solver.limits import Limits
from autoquant.solver.refine import growth_of, point_of, proposals
from autoquant.tuner.ledger import ProofLedger
from autoquant.tuner.stages.prove import Referenced, prove_bits

SHORTEST_PROOF_S = 5.0
"""A proof is not begun with less time left."""


def refine(referenced: Referenced, ledger: ProofLedger, limits: Limits, seed: int) -> None:
    """Prove proposed plans as long as there is time and they make the front grow.

    The allocation by bits follows, since refinement may have found another plan to recommend.
    """
    ledger.listener(StageStarted("refine", 0))
    count, ended = _prove_proposals(referenced, ledger, limits, seed)
    kept = {"plans": count, "ended": ended}
    ledger.store.put_reference(ledger.study_id, "refinement", kept)
    ledger.listener(StageFinished("refine", f"{count} further plans proven; ended: {ended}"))
    prove_bits(referenced.space, ledger)


def _prove_proposals(
    referenced: Referenced, ledger: ProofLedger, limits: Limits, seed: int
) -> tuple[int, str]:
    """Return how many plans were proven, and why it ended."""
    budget, known = ledger.budget, ledger.proven()
    if budget.left_s() < SHORTEST_PROOF_S:
        return 0, "the time budget is spent"
    growth = growth_of(known, limits.minimize, limits.max_ppl_increase)
    slowest_s, count = 0.0, 0
    proposed = proposals(
        referenced.space,
        storage_url=ledger.store.engine.url.render_as_string(hide_password=False),
        seed=seed,
        known=known,
        max_memory_bytes=limits.max_memory_bytes,
        minimize=limits.minimize,
        allowed=referenced.allowed_loss,
    )
    for plan, tell in proposed:
        before_s = budget.left_s()
        # A proof is never cut short, so that one must not begin that cannot end in time.
        if before_s < max(slowest_s, SHORTEST_PROOF_S):
            tell(None)
            return count, "the time budget is spent"
        what = f"{plan.label}, {before_s:.0f} s left"
        ledger.listener(StageProgress("refine", count, what))
        proof = ledger.prove(plan)
        tell(proof)
        growth.add(point_of(proof, limits.minimize))
        slowest_s = max(slowest_s, before_s - budget.left_s())
        count += 1
        if growth.ended:
            grew = f"{growth.last_growth:.2%} over the last {growth.patience}"
            return count, f"the front's hypervolume grew by {grew}"
    return count, "no new plan proposed"
