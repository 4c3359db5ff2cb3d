"""The prove stage: which plans are proven, in which order, and what is learnt from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.records import STUDY
from builders.runner import FakeRunner, say_what_is_predicted
from builders.space import NAMES, SITES, make_ledger, make_space

from autoquant.devices.memory import LIMIT_VARIABLE
from autoquant.errors import CandidateError, PlanError
from autoquant.events import Notice, StageFinished
from autoquant.records import ORIGINAL_LABEL
from autoquant.solver.constraints import Bound
from autoquant.solver.limits import Limits
from autoquant.solver.uniform import uniform_plans
from autoquant.tuner.stages import prove as stage
from autoquant.tuner.stages.prove import prove_front, prove_references

pytestmark = pytest.mark.usefixtures("quick_solver", "quick_collector")
LIMITS = Limits(max_ppl_increase=0.01)
INT8, INT4 = "uniform int8 a16", "uniform int4 a16"


def prove_all(store, runner, space=None, limits=LIMITS, **changes):
    ledger = make_ledger(store, runner, **changes)
    referenced = prove_references(space or make_space(), ledger, SITES, limits)
    prove_front(referenced, ledger, limits)
    return ledger, referenced


def broken_for(label, reason="out of luck"):
    def prove(plan):
        if plan.label == label:
            raise RuntimeError(reason)
        return say_what_is_predicted(plan)

    return prove


def test_the_references_come_first_then_the_best_within_the_limits(store):
    runner = FakeRunner()
    prove_all(store, runner)
    labels = [plan.label for plan in runner.proven]
    assert labels[:3] == [ORIGINAL_LABEL, INT8, INT4]
    assert labels[3:5] == ["structural heuristic", "front: fastest within limits"]
    assert [plan.kind for plan in runner.proven].count("bits") <= 1


def test_as_many_plans_are_proven_as_are_wanted_and_none_twice(store, monkeypatch):
    monkeypatch.setattr(stage, "LEAST_PLANS", 8)
    runner = FakeRunner()
    ledger, _ = prove_all(store, runner)
    ids = [plan.plan_id for plan in runner.proven]
    assert len(ids) == len(set(ids)) >= 8
    assert set(ids) == set(ledger.proofs)


def test_a_plan_that_fails_is_kept_with_its_reason_and_the_search_goes_on(store):
    events = []
    ledger, _ = prove_all(store, FakeRunner(prove=broken_for(INT4)), events=events)
    (reason,) = store.failed_proofs(STUDY).values()
    assert reason == "RuntimeError: out of luck"
    assert len(ledger.proofs) >= 5 and INT4 not in {
        plan.label for plan, _ in ledger.proven().values()
    }
    assert events[-1] == StageFinished("prove", f"{len(ledger.proofs)} plans proven, 1 failed")


def test_an_unquantized_model_that_cannot_be_run_ends_the_search(store):
    runner = FakeRunner(prove=broken_for(ORIGINAL_LABEL))
    with pytest.raises(CandidateError, match=r"unquantized model cannot be run: .*out of luck"):
        prove_all(store, runner)
    assert len(runner.jobs) == 1


def test_a_memory_limit_that_nothing_keeps_is_refused_before_anything_is_proven(store):
    runner = FakeRunner()
    smallest = 1000 + 25 * len(NAMES)
    with pytest.raises(PlanError, match=f"the smallest formats take {smallest:,}"):
        prove_all(store, runner, limits=Limits(max_memory_bytes=smallest - 1))
    assert runner.jobs == []


def test_an_interrupted_run_goes_on_where_it_stopped(store):
    stopped = FakeRunner()
    ledger = make_ledger(store, stopped)
    prove_references(make_space(), ledger, SITES, LIMITS)
    runner = FakeRunner()
    prove_all(store, runner)
    assert not {plan.plan_id for plan in runner.proven} & {plan.plan_id for plan in stopped.proven}
    again = FakeRunner()
    prove_all(store, again)
    assert again.jobs == []


def test_predictions_are_in_whole_model_time_and_kept_for_further_plans(store):
    _, referenced = prove_all(store, FakeRunner())
    context = referenced.space.context
    assert context.rest_ms > 0 and context.original_request_ms == pytest.approx(20.0)
    kept = store.options(STUDY)
    assert [kept[name] for name in NAMES] == [list(layer) for layer in referenced.space.options]
    plans = {plan.label: plan for plan in store.plans(STUDY)}
    predicted = plans[ORIGINAL_LABEL].prediction.request_ms
    assert predicted == pytest.approx(16.0 + 4 * 0.25, rel=0.2)


def test_losses_are_scaled_to_what_uniform_plans_lose(store):
    def twice_and_thrice(plan):
        proof = say_what_is_predicted(plan)
        high = {INT8: 2, INT4: 3}.get(plan.label, 1) * plan.prediction.loss
        return replace(proof, selection_increase=replace(proof.selection_increase, high=high))

    _, referenced = prove_all(store, FakeRunner(prove=twice_and_thrice))
    assert referenced.allowed_loss == pytest.approx(0.01, rel=0.01)
    for layer in referenced.space.options:
        factors = [referenced.space.summed_loss([each]) / each.loss for each in layer[1:]]
        assert factors == pytest.approx([2, 3], rel=0.1)


def test_plans_come_nearer_to_the_limit_until_one_is_there(store):
    def thrice(plan):
        proof = say_what_is_predicted(plan)
        factor = 1.5 if plan.kind == "uniform" else 3
        high = factor * plan.prediction.loss
        return replace(proof, selection_increase=replace(proof.selection_increase, high=high))

    runner = FakeRunner(prove=thrice)
    prove_all(store, runner)
    aimed = [plan for plan in runner.proven if plan.label.startswith("front: aimed")]
    assert aimed and all(plan.prediction.loss < 0.01 / 1.5 for plan in aimed)


@pytest.fixture
def prove_within(store):
    """Prove with a clock that each proof advances; gives labels, events and the ledger."""

    def run(limit_s, limits=LIMITS, longer_s=None):
        clock, events = [0.0], []

        def timed(plan):
            clock[0] += (longer_s or {}).get(plan.label, 10.0)
            return say_what_is_predicted(plan)

        runner = FakeRunner(prove=timed)
        changes = {"events": events, "limit_s": limit_s, "now_s": lambda: clock[0]}
        ledger, _ = prove_all(store, runner, limits=limits, **changes)
        return [plan.label for plan in runner.proven], events, ledger

    return run


OWN = "front: fastest within limits"


def test_three_plans_are_proven_whatever_the_time_budget(prove_within, store):
    labels, events, ledger = prove_within(limit_s=1.0)
    assert labels == [ORIGINAL_LABEL, INT8, OWN]
    assert any(
        event.text.startswith("the time budget of 1 s is too short for two plans")
        and event.text.endswith("50 s are expected to do")  # the first, two, and the delivery
        for event in events
        if isinstance(event, Notice)
    )
    (told,) = [event.text for event in events if "for want of time" in getattr(event, "text", "")]
    assert INT4 in told and "structural heuristic" in told and "the rest of the front" in told
    assert ledger.study.left_out()["heuristic"] == "the time budget is spent"


def test_plans_end_before_the_time_that_a_delivery_needs(prove_within):
    labels, events, ledger = prove_within(limit_s=85.0)
    assert len(labels) == 6
    assert ledger.budget.left_s() >= 20.0
    expected = "75 s of 85 are left, a proof takes about 10: there is time for about 5 plans"
    assert any(getattr(event, "text", "").startswith(expected) for event in events)


def test_the_only_plan_of_the_search_keeps_well_within_the_limit(prove_within):
    _, _, ledger = prove_within(limit_s=1.0)
    (own,) = [plan for plan in ledger.plans.values() if plan.label == OWN]
    assert own.prediction.loss <= 0.5 * LIMITS.max_ppl_increase


def test_one_long_proof_does_not_keep_quicker_ones_from_being_made(prove_within):
    labels, _, _ = prove_within(limit_s=150.0, longer_s={INT8: 60.0})
    assert labels[:3] == [ORIGINAL_LABEL, INT8, OWN] and len(labels) > 3


def test_the_plan_of_the_search_is_worth_more_than_further_uniform_ones(prove_within):
    labels, _, _ = prove_within(limit_s=55.0)
    assert labels[:3] == [ORIGINAL_LABEL, INT8, OWN] and INT4 not in labels


def test_the_uniform_plan_that_is_predicted_best_within_the_limits_comes_first(prove_within):
    labels, _, _ = prove_within(limit_s=1.0, limits=Limits(max_ppl_increase=1.0))
    assert labels[:2] == [ORIGINAL_LABEL, INT4]


def test_what_was_left_out_is_proven_when_there_is_more_time(prove_within):
    first, _, _ = prove_within(limit_s=1.0)
    second, _, ledger = prove_within(limit_s=1e6)
    # The plan of the search goes nearer to the limit when there is time for more.
    assert INT4 in second and set(first) & set(second) <= {OWN}
    assert ledger.left_out == [] and "heuristic" not in ledger.study.left_out()


def test_no_time_is_spent_on_aiming_once_the_budget_is_spent(store):
    def thrice(plan):
        proof = say_what_is_predicted(plan)
        high = (3 if plan.kind == "front" else 1) * plan.prediction.loss
        return replace(proof, selection_increase=replace(proof.selection_increase, high=high))

    runner, events = FakeRunner(prove=thrice), []
    prove_all(store, runner, events=events, limit_s=0.0)
    assert not any("aimed" in plan.label for plan in runner.proven)
    assert Notice("not aimed at the limit any further: the time budget is spent") in events


def test_without_a_plan_within_the_limits_there_is_no_bits_baseline(store):
    def nothing_fits(plan):
        return replace(say_what_is_predicted(plan), memory_bytes=10**9)

    limits = Limits(max_memory_bytes=2000)
    store.update_study(STUDY, limits=limits.as_object())
    ledger, _ = prove_all(store, FakeRunner(prove=nothing_fits), limits=limits)
    assert "no plan is within the limits" in ledger.study.left_out()["bits"]


def test_every_plan_of_a_constrained_space_keeps_to_its_groups(store):
    group = (NAMES[0], NAMES[1])
    bound = Bound((group,), {name: "same format" for name in group})
    runner = FakeRunner()
    prove_all(store, runner, space=make_space(bound))
    assert len(runner.proven) >= 5
    for plan in runner.proven:
        assert plan.layers[0].format == plan.layers[1].format


def test_plans_that_do_not_fit_the_device_are_named_and_not_proven(store):
    events, runner = [], FakeRunner()
    sizes = {p.label: p.prediction.memory_bytes for p in uniform_plans(make_space())}
    ledger = make_ledger(store, runner, events=events)
    ledger.room_bytes = sizes[INT8] - 1
    limits = replace(LIMITS, max_memory_bytes=ledger.room_bytes)
    referenced = prove_references(make_space(), ledger, SITES, limits)
    prove_front(referenced, ledger, limits)
    assert Notice(f"not proven, since they do not fit: {INT8}") in events
    assert [plan.kind for plan in runner.proven].count("original") == 1
    tried = [plan for plan in runner.proven if plan.kind != "original"]
    assert len(tried) > 1
    assert max(plan.prediction.memory_bytes for plan in tried) <= ledger.room_bytes


def test_without_a_plan_that_fits_the_search_says_what_would(store):
    ledger = make_ledger(store, FakeRunner())
    ledger.room_bytes = 10
    with pytest.raises(
        PlanError, match=f"use one with more memory, allow more with {LIMIT_VARIABLE}"
    ):
        prove_references(make_space(), ledger, SITES, replace(LIMITS, max_memory_bytes=10))
