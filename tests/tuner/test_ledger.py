"""What was planned, proven and failed."""

from __future__ import annotations

from contextlib import closing

import pytest
from builders.records import STUDY, put_study
from builders.runner import FakeRunner, say_what_is_predicted
from builders.search import make_plan, make_proof
from builders.space import make_ledger

from autoquant.errors import DiskFullError, ProcessDiedError
from autoquant.events import Notice
from autoquant.store import open_store
from autoquant.tuner.workers.jobs import ProveJob

pytestmark = pytest.mark.usefixtures("quick_collector")


def broken(_plan):
    raise ValueError("no such kernel\nand more")


@pytest.fixture
def runner():
    return FakeRunner()


def never_run(_plan):
    raise AssertionError("what is known is not proven again")


def test_a_proof_is_kept_at_once(store, runner):
    ledger = make_ledger(store, runner)
    proof = ledger.prove(make_plan("a"))
    assert store.proofs(STUDY) == {"a": proof} == ledger.proofs
    assert [plan.plan_id for plan in store.plans(STUDY)] == ["a"]


def test_losses_of_the_unquantized_model_are_handed_from_proof_to_proof(store, runner):
    ledger = make_ledger(store, runner)
    for plan_id in "ab":
        ledger.prove(make_plan(plan_id))
    handed = [job.reference for job in runner.jobs if isinstance(job, ProveJob)]
    assert handed == [{}, {"selection": (1.0, 2.0)}]


def test_losses_that_were_known_before_are_handed_to_the_first_proof(store, runner):
    make_ledger(store, runner, reference={"report": (1.0,)}).prove(make_plan("a"))
    assert runner.jobs[0].reference == {"report": (1.0,)}


def test_a_failure_is_kept_with_its_reason_and_reported(store):
    events = []
    ledger = make_ledger(store, FakeRunner(prove=broken), events)
    assert ledger.prove(make_plan("a", label="front 7")) is None
    assert ledger.failures == {"a": "ValueError: no such kernel"} == store.failed_proofs(STUDY)
    assert events[-1] == Notice(
        "plan front 7 could not be proven: ValueError: no such kernel; the search goes on without it"
    )
    assert ledger.prove(make_plan("a")) is None and len(ledger.proofs) == 0


def dying(times):
    """A proof whose process dies so often before it succeeds."""
    left = [times]

    def prove(plan):
        if left[0]:
            left[0] -= 1
            raise ProcessDiedError("its process was ended by SIGKILL")
        return say_what_is_predicted(plan)

    return prove


def test_a_process_that_was_killed_once_is_no_failure_of_the_plan(store):
    events = []
    ledger = make_ledger(store, FakeRunner(prove=dying(1)), events)
    proof = ledger.prove(make_plan("a"))
    assert proof is not None and store.proofs(STUDY) == {"a": proof}
    assert Notice("tried once more: its process was ended by SIGKILL") in events


def test_a_plan_whose_process_dies_each_time_has_failed(store):
    ledger = make_ledger(store, FakeRunner(prove=dying(2)))
    assert ledger.prove(make_plan("a")) is None
    assert store.failed_proofs(STUDY) == {"a": "ProcessDiedError: its process was ended by SIGKILL"}


def test_a_full_disk_is_no_failure_of_the_plan(store):
    def full(_plan):
        raise OSError(28, "No space left on device", "/tmp/x.so")

    ledger = make_ledger(store, FakeRunner(prove=full))
    with pytest.raises(DiskFullError, match="no room for /tmp/x"):
        ledger.prove(make_plan("a"))
    assert store.failed_proofs(STUDY) == {} == store.proofs(STUDY)
    assert make_ledger(store).prove(make_plan("a")) is not None


def test_a_proof_that_another_process_saved_meanwhile_counts(store, runner):
    mine, other = make_ledger(store, FakeRunner(prove=broken)), make_ledger(store, runner)
    proof = other.prove(make_plan("a"))
    assert mine.prove(make_plan("a")) == proof and mine.failures == {}
    assert mine.proofs == store.proofs(STUDY) == {"a": proof}


def test_what_is_known_is_restored_and_not_proven_again(store):
    first = make_ledger(store)
    first.prove(make_plan("a"))
    make_ledger(store, FakeRunner(prove=broken)).prove(make_plan("b"))
    again = make_ledger(store, FakeRunner(prove=never_run))
    assert again.proofs == first.proofs and set(again.failures) == {"b"}
    assert again.prove(make_plan("a")) == first.proofs["a"]
    assert again.prove(make_plan("b")) is None
    assert {plan_id: plan.plan_id for plan_id, (plan, _) in again.proven().items()} == {"a": "a"}


def test_a_user_who_interrupts_is_not_a_failure_of_the_plan(store):
    def interrupted(_plan):
        raise KeyboardInterrupt

    ledger = make_ledger(store, FakeRunner(prove=interrupted))
    with pytest.raises(KeyboardInterrupt):
        ledger.prove(make_plan("a"))
    assert store.failed_proofs(STUDY) == {} == store.proofs(STUDY)


def test_time_is_noted_after_each_proof(store):
    clock = [0.0]

    def slow(plan):
        clock[0] += 7
        return say_what_is_predicted(plan)

    ledger = make_ledger(store, FakeRunner(prove=slow), now_s=lambda: clock[0])
    ledger.prove(make_plan("a"))
    assert store.study(STUDY).spent_s == 7


def test_a_baseline_that_is_another_plan_is_left_out_and_says_which(store, runner):
    events = []
    ledger = make_ledger(store, runner, events)
    ledger.prove(make_plan("a", label="uniform int8", kind="uniform"))
    ledger.prove_baseline("bits", make_plan("a", kind="bits"))
    ledger.prove_baseline("heuristic", make_plan("b", kind="heuristic"))
    assert [plan.plan_id for plan in runner.proven] == ["a", "b"]
    assert ledger.study.left_out() == {"bits": "the same as plan a (uniform int8)"}
    assert Notice("no bits plan: the same as plan a (uniform int8)") in events


@pytest.mark.parametrize(("engine", "counted"), [("llama.cpp", 7000), ("vllm", 100), (None, 100)])
def test_memory_of_a_proof_is_that_of_the_engines_file(tmp_path, engine, counted):
    """A limit on memory is one of the file that is exported, so a proof counts its bytes."""
    constraints = {"constraints": {"engine": engine}} if engine else {}
    runner = FakeRunner(prove=lambda plan: make_proof(plan.plan_id, memory=100))
    with closing(open_store(tmp_path / "another.db")) as store:
        put_study(store, identity=constraints)
        ledger = make_ledger(store, runner)
        assert ledger.prove(make_plan("a", memory_bytes=7000)).memory_bytes == counted
