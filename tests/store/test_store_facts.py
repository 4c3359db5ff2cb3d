"""What goes in comes out, once: the same in a file and on a server."""

import math
from dataclasses import replace

import pytest
from builders.records import MODEL, STUDY
from builders.rich import DEVICE, WORKLOAD, delivery, fill, measurement, plan, proof, recording

from autoquant.errors import PlanError, StoreError
from autoquant.records import Roofline, TaskScore, Workload
from autoquant.store.columns import to_json
from autoquant.typed import read

BACKENDS = ("sqlite", "postgresql")


def test_timings_come_back_as_they_went_in(filled):
    measured = [
        measurement(),
        measurement(m=8, latency=1 / 3),
        measurement(kernel="other", outcome="failed", reason="it broke", relative_error=None),
        measurement(m=8, kernel="other", outcome="incorrect", reason="off", relative_error=0.5),
    ]
    filled.put_timings(DEVICE, "1", measured)
    assert filled.timings(DEVICE, "1") == {m.subject: m for m in measured}


def test_timings_belong_to_their_device_and_protocol(filled):
    other = replace(DEVICE, threads=4)
    filled.put_device(other)
    filled.put_timings(DEVICE, "1", [measurement(latency=1.0)])
    filled.put_timings(other, "1", [measurement(latency=2.0)])
    filled.put_timings(DEVICE, "2", [measurement(latency=3.0)])
    found = [
        next(iter(filled.timings(*key).values())).samples_us[0]
        for key in ((DEVICE, "1"), (other, "1"))
    ]
    assert found == [1.0, 2.0]
    assert filled.timings(other, "2") == {}


def test_a_timing_is_kept_once_and_the_first_one_counts(filled, query):
    first, second = measurement(latency=1.0), measurement(latency=2.0)
    assert filled.put_timings(DEVICE, "1", [first]) == [first]
    other = measurement(m=2)
    assert filled.put_timings(DEVICE, "1", [second, other]) == [first, other]
    assert query("SELECT m, latency_us FROM timing") == [(1, 1.125), (2, other.latency_us)]


def test_timings_that_were_made_together_are_kept_together_or_not_at_all(filled, query):
    broken = measurement(m=3, outcome=None)  # the table refuses it
    with pytest.raises(StoreError):
        filled.put_timings(DEVICE, "1", [measurement(m=2), broken])
    assert query("SELECT m FROM timing") == []


def test_timings_of_an_unknown_device_are_refused(store):
    with pytest.raises(StoreError, match=r"(?i)foreign key"):
        store.put_timings(DEVICE, "1", [measurement()])


def test_a_roofline_comes_back_as_it_went_in_and_belongs_to_its_device(filled):
    roofline = Roofline(
        bandwidth_bytes_per_s=1e11 / 3, flops_per_s={"bfloat16": 1e12, "int8": 2e12 / 3}
    )
    assert filled.roofline(DEVICE) is None
    filled.put_roofline(DEVICE, roofline)
    assert filled.roofline(DEVICE) == roofline
    assert filled.roofline(replace(DEVICE, threads=4)) is None


def test_a_roofline_measured_again_replaces_the_old_one(filled, query):
    for bandwidth in (1.0, 2.0):
        filled.put_roofline(DEVICE, Roofline(bandwidth_bytes_per_s=bandwidth, flops_per_s={}))
    assert query("SELECT bandwidth_bytes_per_s FROM roofline") == [(2.0,)]


def task_score(**changes):
    base = {
        "task": "arc",
        "metric": "acc",
        "value": 1 / 3,
        "stderr": 0.01,
        "samples": 9,
        "limit": 9,
    }
    return TaskScore(**(base | {"lm_eval_version": "0.4.13"} | changes))


def test_task_scores_come_back_as_they_went_in_and_belong_to_their_subject(filled):
    scores = [
        task_score(),
        task_score(metric="acc_norm", stderr=None),
        task_score(limit=None, samples=None),
    ]
    filled.put_task_scores("abcd0001", "bfloat16", scores)
    filled.put_task_scores(MODEL, "bfloat16", [task_score(value=0.5)])
    assert filled.task_scores("abcd0001", "bfloat16") == scores
    assert filled.task_scores(MODEL, "bfloat16") == [task_score(value=0.5)]
    assert filled.task_scores(MODEL, "float32") == []


def test_a_task_score_measured_again_replaces_the_old_one_of_the_same_limit_and_version(filled):
    for value in (0.25, 0.5):
        filled.put_task_scores(MODEL, "bfloat16", [task_score(value=value, limit=None)])
    others = [task_score(limit=None, lm_eval_version="0.5"), task_score(limit=8)]
    filled.put_task_scores(MODEL, "bfloat16", others)
    assert filled.task_scores(MODEL, "bfloat16") == [task_score(value=0.5, limit=None), *others]


def test_losses_come_back_as_they_went_in_and_are_kept_once(filled, query):
    losses = {
        ("a", "int8-row+a16"): 0.0,
        ("a", "int8-row+a8-row"): 1e-300,
        ("b", "int8-row+a16"): 1 / 3,
    }
    filled.put_losses(MODEL, "text", "isolated", losses)
    assert filled.losses(MODEL, "text", "isolated") == losses
    assert filled.losses(MODEL, "another text", "isolated") == {}
    filled.put_losses(MODEL, "text", "isolated", {("b", "int8-row+a16"): 0.5, ("c", "x"): 0.25})
    assert filled.losses(MODEL, "text", "isolated") == {**losses, ("c", "x"): 0.25}
    assert query("SELECT count(*) FROM loss") == [(4,)]


def test_plans_come_back_as_they_went_in(filled):
    filled.put_plan(plan())
    assert filled.plans(STUDY) == [plan()]
    assert filled.plan("abcd0001") == plan()


def test_plans_come_in_the_order_in_which_they_were_made(filled):
    for plan_id in ("zzzz", "aaaa", "mmmm"):
        filled.put_plan(plan(plan_id))
    assert [p.plan_id for p in filled.plans(STUDY)] == ["zzzz", "aaaa", "mmmm"]


def test_a_plan_put_again_replaces_its_prediction_and_keeps_its_place(filled):
    filled.put_plan(plan("first"))
    filled.put_plan(plan("second"))
    again = replace(plan("first"), prediction=replace(plan().prediction, request_ms=9.0))
    filled.put_plan(again)
    assert filled.plans(STUDY) == [again, plan("second")]


@pytest.mark.parametrize("increase", [math.inf, 0.5])
def test_proofs_come_back_as_they_went_in(filled, increase):
    filled.put_plan(plan())
    wanted = proof(increase=replace(proof().increase, high=increase))
    filled.put_proof("abcd0001", wanted)
    assert filled.proofs(STUDY) == {"abcd0001": wanted}
    assert filled.failed_proofs(STUDY) == {}


def test_a_plan_is_proven_once_and_a_proof_counts_more_than_a_failure(filled):
    filled.put_plan(plan())
    first, second = proof(perplexity=10.0), proof(perplexity=20.0)
    assert filled.put_proof("abcd0001", None, "the kernel failed") is None
    assert filled.put_proof("abcd0001", first) == first
    assert filled.put_proof("abcd0001", second) == first
    assert filled.put_proof("abcd0001", None, "the kernel failed") == first
    assert filled.proofs(STUDY) == {"abcd0001": first}
    assert filled.failed_proofs(STUDY) == {}


def test_a_failed_proof_keeps_its_reason(filled):
    filled.put_plan(plan())
    filled.put_proof("abcd0001", None, "the kernel failed")
    assert filled.proofs(STUDY) == {}
    assert filled.failed_proofs(STUDY) == {"abcd0001": "the kernel failed"}


def test_deliveries_come_back_as_they_went_in(filled):
    filled.put_plan(plan())
    for wanted in (
        delivery(),
        delivery(times=None, original_times=None, ratio=None, reason="it cannot be loaded"),
    ):
        filled.put_delivery(wanted)
        assert filled.deliveries(STUDY) == {"abcd0001": wanted}, "the last one counts"


def test_deliveries_belong_to_their_study_and_can_be_forgotten(filled):
    fill(filled, "another1")
    for plan_id, study_id in (("one", STUDY), ("two", STUDY), ("three", "another1")):
        filled.put_plan(plan(plan_id, study_id=study_id))
        filled.put_delivery(delivery(plan_id))
    assert (set(filled.deliveries(STUDY)), set(filled.deliveries("another1"))) == (
        {"one", "two"},
        {"three"},
    )
    filled.forget_deliveries(["one"])
    assert set(filled.deliveries(STUDY)) == {"two"}


def test_proofs_belong_to_their_study(filled):
    fill(filled, "another1")
    filled.put_plan(plan("one"))
    filled.put_plan(plan("two", study_id="another1"))
    for plan_id in ("one", "two"):
        filled.put_proof(plan_id, proof(plan_id))
    assert set(filled.proofs(STUDY)) == {"one"}
    assert set(filled.proofs("another1")) == {"two"}


def test_a_plan_is_found_by_the_beginning_of_its_id(filled):
    for plan_id in ("abcd0001", "abcd0002", "a%_x0003"):
        filled.put_plan(plan(plan_id))
    assert filled.plan("abcd0002").plan_id == "abcd0002"
    assert filled.plan("a%").plan_id == "a%_x0003"


@pytest.mark.parametrize(
    ("asked", "what"),
    [("abcd", "2 plans"), ("", "no plan"), ("nope", "no plan"), ("%", "no plan"), ("_", "no plan")],
)
def test_an_id_that_fits_no_plan_or_several_is_refused(filled, asked, what):
    for plan_id in ("abcd0001", "abcd0002", "efgh0003"):
        filled.put_plan(plan(plan_id))
    with pytest.raises(PlanError, match=f"^{what} with id '{asked}'"):
        filled.plan(asked)


def test_a_study_comes_back_as_it_went_in(filled):
    filled.update_study(
        STUDY, recording=recording(), complete=True, spent_s=1.5, recommended="abcd0001"
    )
    facts = filled.study(STUDY)
    assert facts.recording == recording()
    assert (facts.device, facts.workload) == (DEVICE, WORKLOAD)
    assert (facts.complete, facts.spent_s, facts.recommended) == (True, 1.5, "abcd0001")
    assert facts.limits == {"max_ppl_increase": 0.01, "max_memory_bytes": None}


def test_a_study_put_again_gets_new_limits_and_keeps_the_rest(filled):
    filled.update_study(STUDY, complete=True, spent_s=2.0)
    filled.put_study(
        STUDY,
        model_hash=MODEL,
        device=DEVICE,
        identity={},
        workload=WORKLOAD,
        limits={"max_ppl_increase": 0.5},
    )
    facts = filled.study(STUDY)
    assert (facts.limits, facts.complete, facts.spent_s) == ({"max_ppl_increase": 0.5}, True, 2.0)


def test_the_study_last_worked_on_comes_first(filled):
    fill(filled, "another1")
    assert filled.study().study_id == "another1"
    filled.update_study(STUDY, spent_s=3.0)
    assert filled.studies() == [STUDY, "another1"]
    assert filled.study().study_id == STUDY


def test_a_study_that_is_not_there_is_refused(store):
    with pytest.raises(PlanError, match="holds no study yet"):
        store.study()
    fill(store)
    with pytest.raises(PlanError, match=f"no study 'nope' here; studies: {STUDY}"):
        store.study("nope")
    with pytest.raises(PlanError):
        store.update_study("nope", complete=True)


def test_references_are_replaced_by_name(filled):
    filled.put_reference(STUDY, "losses", {"report": [1.0, 2.0]})
    filled.put_reference(STUDY, "losses", {"report": [3.0]})
    assert filled.references(STUDY) == {"losses": {"report": [3.0]}}


def test_a_workload_comes_back_from_its_json():
    assert read(Workload, to_json(WORKLOAD)) == WORKLOAD
