"""A search space of made-up layers, and a ledger whose plans a fake runner proves."""

from __future__ import annotations

from autoquant.solver.constraints import UNBOUND
from autoquant.solver.planning import PlanContext
from autoquant.solver.space import SearchSpace
from autoquant.tuner.budget import Budget
from autoquant.tuner.expected import Expected
from autoquant.tuner.ledger import ProofLedger

from .records import MODEL, STUDY, WORKLOAD, make_site
from .runner import FakeRunner
from .search import choice

NAMES = [f"layers.{block}.{name}" for block in range(3) for name in ("gate", "up")]
SITES = [make_site(name) for name in NAMES]


def make_space(bound=UNBOUND):
    """Six layers, each unquantized, in int8 or in int4; the later a layer, the more int4 costs."""
    options = []
    for number, name in enumerate(NAMES):
        int8 = {"fmt": "int8/plain", "us": 900.0 + number, "loss": 0.0005, "memory": 50}
        int4 = {"fmt": "int4/plain", "us": 300.0 + 9 * number, "loss": 0.002 * (number + 1)}
        options.append([choice(name), choice(name, **int8), choice(name, **int4, memory=25)])
    context = PlanContext(
        study_id=STUDY,
        model_hash=MODEL,
        dtype="bfloat16",
        workload=WORKLOAD,
        other_bytes=1000,
        bound=bound,
    )
    return SearchSpace(options, context, [layer[0] for layer in options])


EXPECTED = Expected(profile_s=0.0, score_s=0.0, proof_s=5.0, deliver_s=20.0, learnt=True)


def make_ledger(store, runner=None, events=None, limit_s=1e6, now_s=lambda: 0.0, reference=None):
    """A ledger that starts from the store; by default time stands still."""
    budget = Budget(
        store=store,
        study_id=STUDY,
        limit_s=limit_s,
        started_s=now_s(),
        spent_before_s=0.0,
        now_s=now_s,
    )
    listener = (events if events is not None else []).append
    runner = runner or FakeRunner()
    return ProofLedger(store, STUDY, runner, budget, listener, reference or {}, EXPECTED)
