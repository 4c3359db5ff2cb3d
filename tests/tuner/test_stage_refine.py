"""The refine stage: plans are proposed as long as there is time and the front grows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.records import STUDY
from builders.runner import FakeRunner, say_what_is_predicted
from builders.space import EXPECTED, SITES, make_ledger, make_space

from autoquant.solver import refine as solver_refine
from autoquant.solver.limits import Limits
from autoquant.tuner.stages import refine as stage
from autoquant.tuner.stages.prove import prove_front, prove_references

pytestmark = pytest.mark.usefixtures("quick_solver", "quick_collector")
LIMITS = Limits(max_ppl_increase=0.01)


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def refine(store, clock):
    """Refine with a clock that proofs advance; gives the plans that were proven for it."""

    def run(limit_s, proof_s=10.0, prove=say_what_is_predicted):
        def timed(plan):
            if plan.kind == "refined":
                clock[0] += proof_s
            return prove(plan)

        runner = FakeRunner(prove=timed)
        proofs = make_ledger(store, runner, limit_s=limit_s, now_s=lambda: clock[0])
        referenced = prove_references(make_space(), proofs, SITES, LIMITS)
        prove_front(referenced, proofs, LIMITS)
        stage.refine(referenced, proofs, LIMITS, 0)
        return [plan for plan in runner.proven if plan.kind == "refined"], proofs

    return run


def ended(store):
    return store.references(STUDY)["refinement"]["ended"]


def test_it_ends_when_the_time_is_spent(refine, store):
    plans, _ = refine(limit_s=52.0)
    assert len(plans) == 3  # a fourth would leave too little time for the delivery
    assert ended(store) == "the time budget is spent"


def test_no_proof_is_begun_that_would_take_longer_than_what_is_left(refine, store):
    plans, _ = refine(limit_s=EXPECTED.proof_s / 2)
    assert plans == [] and ended(store) == "the time budget is spent"


def test_it_ends_when_the_front_stops_growing(refine, store, monkeypatch):
    monkeypatch.setattr(solver_refine, "PATIENCE", 2)

    def no_better(plan):
        proof = say_what_is_predicted(plan)
        return replace(proof, request_ms=99.0) if plan.kind == "refined" else proof

    plans, _ = refine(limit_s=1e6, prove=no_better)
    assert len(plans) == 2
    assert ended(store) == "the front's hypervolume grew by 0.00% over the last 2"


def test_a_proposal_that_fails_is_kept_and_another_one_tried(refine, store):
    def broken(plan):
        if plan.kind == "refined":
            raise RuntimeError("no memory")
        return say_what_is_predicted(plan)

    plans, proofs = refine(limit_s=55.0, prove=broken)
    assert len(plans) == 3
    assert set(proofs.failures) == {plan.plan_id for plan in plans}


def test_it_goes_on_with_what_the_store_knows(refine, store, clock):
    first, _ = refine(limit_s=45.0)
    clock[0] = 0.0
    second, _ = refine(limit_s=45.0)
    assert first and not {plan.plan_id for plan in first} & {plan.plan_id for plan in second}
