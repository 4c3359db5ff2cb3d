"""What a search is expected to take: a guess, corrected by earlier searches on the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.records import make_choice, make_delivery, make_plan, make_proof

from autoquant.devices.base import Paces
from autoquant.devices.cpu import CpuBackend
from autoquant.events import Ending, Notice
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Measurement
from autoquant.tuner.budget import Budget
from autoquant.tuner.expected import Work, expect, keep_work, work_of
from autoquant.tuner.stages.expect import announce
from autoquant.tuner.stages.profile import subjects_to_time
from autoquant.tuner.stages.record import record_linears

PACES = Paces(
    timing_s=2.0,
    score_s=100.0,
    proof_s=4.0,
    proof_linear_s=1.0,
    deliver_s=30.0,
    deliver_linear_s=2.0,
)
WORK = Work(timings=10, scores=0.5, linears=6)


@pytest.fixture(autouse=True)
def paces(monkeypatch):
    monkeypatch.setattr(CpuBackend, "paces", PACES)


def test_without_an_earlier_search_it_is_the_guess_and_says_so(setup):
    found = expect(setup.settled, setup.store, WORK)
    assert (found.profile_s, found.score_s, found.proof_s, found.deliver_s) == (20, 50, 10, 42)
    assert found.least_s == 20 + 50 + 3 * 10 + 42
    assert not found.learnt and "roughly" in found.words()


def finished(setup, seconds, work):
    """Let the study have ended before, with these seconds for what it had to do."""
    store, study_id = setup.store, setup.settled.study_id
    recording = record_linears(setup)
    keep_work(store, study_id, work)
    store.put_reference(
        study_id,
        "stages",
        {"seconds": {"profile": seconds["profile"], "score": seconds["score"]}},
    )
    for plan_id, kind, took_s in (("a", "original", 99.0), ("b", "front", seconds["proof"])):
        layers = [make_choice(latency_us={})]
        store.put_plan(make_plan(plan_id, layers, kind=kind, study_id=study_id))
        store.put_proof(plan_id, make_proof(plan_id, seconds={"compile": took_s, "time": 0.0}))
    store.put_delivery(make_delivery("b", seconds={"ready": seconds["deliver"]}))
    return len(recording.sites)


def test_an_earlier_search_corrects_each_part_in_proportion_to_the_work(setup):
    linears = finished(
        setup,
        {"profile": 60.0, "score": 5.0, "proof": 3.0, "deliver": 10.0},
        Work(timings=15, scores=0.1, linears=0),
    )
    found = expect(setup.settled, setup.store, replace(WORK, linears=linears))
    assert found.profile_s == pytest.approx(60.0 / 15 * 10)
    assert found.score_s == pytest.approx(5.0 / 0.1 * 0.5)
    assert (found.proof_s, found.deliver_s) == pytest.approx((3.0, 10.0))
    assert found.learnt and "as searches here took" in found.words()


def test_a_search_of_another_device_counts_for_nothing(setup):
    finished(
        setup,
        {"profile": 60.0, "score": 5.0, "proof": 3.0, "deliver": 10.0},
        Work(timings=15, scores=0.1, linears=0),
    )
    elsewhere = replace(setup.settled.hardware, name="another CPU")
    settled = replace(setup.settled, hardware=elsewhere)
    assert not expect(settled, setup.store, WORK).learnt


def test_what_the_store_knows_is_no_work(setup):
    recording = record_linears(setup)
    subjects, _ = subjects_to_time(setup, recording)
    before = work_of(setup.settled, setup.store, recording, subjects)
    assert 0 < before.timings <= len(subjects)
    known = [Measurement(subject=each, outcome="ok", samples_us=(1.0, 1.0)) for each in subjects]
    setup.store.put_timings(setup.settled.hardware, PROTOCOL, known)
    assert work_of(setup.settled, setup.store, recording, subjects).timings == 0


@pytest.mark.parametrize(("limit_s", "said"), [(1.0, "is too short"), (1e6, "further plans")])
def test_the_search_says_at_once_whether_the_time_budget_is_enough(setup, events, limit_s, said):
    budget = Budget(
        store=setup.store,
        study_id=setup.settled.study_id,
        limit_s=limit_s,
        started_s=0.0,
        spent_before_s=0.0,
        now_s=lambda: 0.0,
    )
    expected = announce(setup, record_linears(setup), budget)
    (notice,) = [each for each in events if isinstance(each, Notice) and said in each.text]
    assert expected.words() in notice.text
    assert events[-1] == Ending(max(limit_s, expected.least_s))
