"""Which plans are recommended once they were run as their user runs them, and how a search comes to the one."""

from __future__ import annotations

import pytest
from builders.records import STUDY, fail_delivery, make_delivery
from builders.search import make_proof

from autoquant.errors import PlanError
from autoquant.events import Notice
from autoquant.records import DISTURBED
from autoquant.solver.limits import Limits
from autoquant.tuner import deliver
from autoquant.tuner.deliver import deliver_best


@pytest.fixture
def study(study_of):
    """Four plans, `a` the fastest and `d` the slowest, beside the unquantized model."""
    original = make_proof("original", ms=20.0, memory=200)
    return study_of(
        original,
        *(make_proof(name, ms=ms) for name, ms in (("a", 5), ("b", 8), ("c", 10), ("d", 12))),
    )


def row_of(study, plan_id):
    return next(row for row in study.rows() if row["plan_id"] == plan_id)


def deliveries(**found):
    """Deliver plans as it is said here, and note which were asked for."""
    asked = []

    def run(plan):
        asked.append(plan.plan_id)
        return found[plan.plan_id]

    return run, asked


def test_without_deliveries_the_proofs_decide(study):
    assert study.recommended().plan_id == "a" and study.refused() == {}
    assert (
        row_of(study, "a")["as_run_speedup"] is None and row_of(study, "a")["not_recommended"] == ""
    )


def test_a_plan_that_wins_as_its_user_runs_it_is_recommended_and_shown_so(study):
    study.store.put_delivery(make_delivery("a", ratio=0.5))
    row = row_of(study, "a")
    assert (
        row["recommended"]
        and row["as_run_loop"] == "generate"
        and row["as_run_where"] == "new process"
    )
    assert (row["as_run_request_ms"], row["as_run_original_request_ms"]) == (5.0, 10.0)
    assert (row["as_run_step_ms"], row["as_run_original_first_token_ms"]) == (1.0, 4.0)
    assert row["as_run_speedup_low"] < row["as_run_speedup"] == 2.0 < row["as_run_speedup_high"]


@pytest.mark.parametrize("ratio", [1.2, 0.995])
def test_a_plan_that_does_not_surely_win_there_is_not_recommended(study, ratio):
    study.store.put_delivery(make_delivery("a", ratio=ratio, half=0.01))
    assert study.recommended().plan_id == "original"
    assert (
        "as long" in row_of(study, "a")["not_recommended"] and not row_of(study, "a")["recommended"]
    )


def test_a_plan_that_cannot_be_used_is_recommended_under_no_limits(study):
    study.store.put_delivery(fail_delivery("a"))
    assert study.refused(Limits(minimize="memory")) == {"a": "it cannot be loaded"}
    assert study.best().plan_id == "b" and study.best(minimize="memory").plan_id != "a"
    assert row_of(study, "a")["not_recommended"] == "it cannot be loaded"


def test_a_slower_plan_serves_where_memory_is_what_counts(study):
    study.store.put_delivery(make_delivery("a", ratio=1.5))
    assert study.refused(Limits(minimize="memory")) == {}
    assert study.refused(Limits(max_memory_bytes=150)) == {}, "the unquantized model does not fit"
    assert set(study.refused(Limits(max_memory_bytes=200))) == {"a"}


def test_where_nothing_within_the_limits_can_be_used_the_reasons_are_said(study_of):
    study = study_of(make_proof("a", ms=5))
    study.store.put_delivery(fail_delivery("a"))
    assert study.recommended() is None
    with pytest.raises(
        PlanError, match="no plan within the limits can be used: a it cannot be loaded"
    ):
        study.best_of_search()


def test_the_best_plan_is_delivered_and_kept(study, caplog):
    run, asked = deliveries(a=make_delivery("a"))
    deliver_best(study, run, lambda _event: None)
    assert (
        asked == ["a"] and study.recommended().plan_id == "a" and set(study.deliveries()) == {"a"}
    )
    deliver_best(study, run, lambda _event: pytest.fail("there is nothing to do"))
    assert asked == ["a"]


def test_the_next_best_is_tried_and_why_is_told(study):
    run, asked = deliveries(
        a=fail_delivery("a"), b=make_delivery("b", ratio=1.1), c=make_delivery("c", ratio=0.9)
    )
    events = []
    deliver_best(study, run, events.append)
    assert asked == ["a", "b", "c"] and study.recommended().plan_id == "c"
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert len(notices) == 2
    assert (
        "plan a (front a) is not recommended: it cannot be loaded" in notices[0]
        and "1.10 times" in notices[1]
    )


def test_after_a_few_tries_the_unquantized_model_is_recommended(study, monkeypatch):
    monkeypatch.setattr(deliver, "TRIES", 2)
    run, asked = deliveries(a=fail_delivery("a"), b=make_delivery("b", ratio=1.1))
    deliver_best(study, run, lambda _event: None)
    assert asked == ["a", "b"]
    assert study.recommended().plan_id == "original" and study.candidate().plan_id == "c"


def test_a_plan_that_was_refused_on_a_busy_machine_is_tried_again(study):
    busy = (f"{DISTURBED} 60% of the machine",)
    study.store.put_delivery(make_delivery("a", ratio=1.2, notes=busy))
    study.store.put_delivery(make_delivery("b", ratio=1.2))
    run, asked = deliveries(a=make_delivery("a", ratio=0.6))
    deliver_best(study, run, lambda _event: None)
    assert asked == ["a"] and study.recommended().plan_id == "a"
    assert study.store.deliveries(STUDY)["a"].notes == ()


def test_a_plan_that_a_busy_machine_could_not_tell_apart_is_said_to_be_that(study):
    busy = (f"{DISTURBED} 60% of the machine",)
    study.store.put_delivery(make_delivery("a", ratio=0.4, half=0.7, notes=busy))
    reason = row_of(study, "a")["not_recommended"]
    assert "other programs used the machine" in reason and "times it again" in reason
