"""The refine stage: what is left of the time goes to plans that Optuna proposes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from autoquant.events import StageFinished, StageProgress, StageStarted
from autoquant.records import Plan, Proof
from autoquant.solver.limits import Limits
from autoquant.solver.refine import growth_of, point_of, proposals
from autoquant.tuner.ledger import ProofLedger
from autoquant.tuner.stages.prove import Referenced, prove_bits

AHEAD = 4
"""So many plans are proposed before the first of them is proven, for as many workers.

It is the same for fewer, so that the proposals are.
"""


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
    if not ledger.has_time():
        return 0, "the time budget is spent"
    known = ledger.proven()
    growth = growth_of(known, limits.minimize, limits.max_ppl_increase)
    count = 0
    proposed = proposals(
        referenced.space,
        storage_url=ledger.store.engine.url.render_as_string(hide_password=False),
        seed=seed,
        known=known,
        max_memory_bytes=limits.max_memory_bytes,
        minimize=limits.minimize,
        allowed=referenced.allowed_loss,
    )
    window: deque[tuple[Plan, Callable[[Proof | None], None]]] = deque()
    while True:
        while len(window) < AHEAD and (new := next(proposed, None)) is not None:
            window.append(new)
            ledger.ahead(new[0])
        if not window:
            return count, "no new plan proposed"
        plan, tell = window.popleft()
        if not (ledger.is_ahead(plan) or ledger.has_time()):
            tell(None)
            _drop(window, ledger)
            return count, "the time budget is spent"
        what = f"{plan.label}, {ledger.budget.left_s():.0f} s left"
        ledger.listener(StageProgress("refine", count, what))
        proof = ledger.prove(plan)
        tell(proof)
        growth.add(point_of(proof, limits.minimize))
        count += 1
        if growth.ended:
            _drop(window, ledger)
            grew = f"{growth.last_growth:.2%} over the last {growth.patience}"
            return count, f"the front's hypervolume grew by {grew}"


def _drop(
    window: Iterable[tuple[Plan, Callable[[Proof | None], None]]], ledger: ProofLedger
) -> None:
    """Do not prove these proposals."""
    for _plan, tell in window:
        tell(None)
    ledger.drop_ahead()
