"""Removing a study: its own rows, and no others."""

import pytest
from builders.records import MODEL, STUDY
from builders.rich import DEVICE, delivery, fill, measurement, plan, proof, task_score
from sqlalchemy import text

from autoquant.errors import PlanError, StoreError
from autoquant.store.remove import RemovedRows, find_study, remove_study

OTHER = "5tuff001"


@pytest.fixture
def two_studies(filled):
    fill(filled, OTHER)
    filled.put_timings(DEVICE, "1", [measurement()])
    filled.put_task_scores(MODEL, "bfloat16", [task_score()])
    filled.put_losses(MODEL, "text", "isolated", {("a", "int8+a16"): 0.5})
    for study_id, plan_ids in ((STUDY, ("one", "two")), (OTHER, ("three",))):
        filled.put_reference(study_id, "losses", {"report": [1.0]})
        for plan_id in plan_ids:
            filled.put_plan(plan(plan_id, study_id=study_id))
            filled.put_proof(plan_id, proof(plan_id))
            filled.put_delivery(delivery(plan_id))
            filled.put_task_scores(plan_id, "bfloat16", [task_score()])
    return filled


def test_only_the_rows_of_that_study_go(two_studies):
    assert remove_study(two_studies, STUDY) == RemovedRows(
        plans=2, proofs=2, deliveries=2, references=1, task_scores=2
    )
    assert two_studies.studies() == [OTHER]
    assert [kept.plan_id for kept in two_studies.plans(OTHER)] == ["three"]
    assert set(two_studies.proofs(OTHER)) == set(two_studies.deliveries(OTHER)) == {"three"}
    assert two_studies.references(OTHER) == {"losses": {"report": [1.0]}}
    assert two_studies.task_scores("three", "bfloat16") == [task_score()]
    assert two_studies.plans(STUDY) == []
    assert (
        two_studies.task_scores("one", "bfloat16")
        == two_studies.task_scores("two", "bfloat16")
        == []
    )
    assert two_studies.references(STUDY) == {}


def test_what_belongs_to_devices_and_models_stays(two_studies):
    remove_study(two_studies, STUDY)
    assert list(two_studies.timings(DEVICE, "1").values()) == [measurement()]
    assert two_studies.losses(MODEL, "text", "isolated") == {("a", "int8+a16"): 0.5}
    assert two_studies.task_scores(MODEL, "bfloat16") == [task_score()], "the unquantized model's"


def test_a_removal_that_fails_removes_nothing(two_studies):
    with two_studies.engine.begin() as connection:
        connection.execute(
            text(
                "CREATE TRIGGER kept BEFORE DELETE ON study BEGIN SELECT RAISE(ABORT, 'kept'); END"
            )
        )
    with pytest.raises(StoreError, match="kept"):
        remove_study(two_studies, STUDY)
    assert len(two_studies.plans(STUDY)) == 2
    assert set(two_studies.proofs(STUDY)) == {"one", "two"}
    assert two_studies.references(STUDY) != {}
    assert two_studies.task_scores("one", "bfloat16") == [task_score()]


def test_a_study_is_found_by_the_beginning_of_its_id(two_studies):
    assert find_study(two_studies, "5tud") == STUDY
    assert find_study(two_studies, OTHER) == OTHER


def test_a_whole_id_stands_for_itself_even_if_others_begin_with_it(two_studies):
    fill(two_studies, f"{STUDY}9")
    assert find_study(two_studies, STUDY) == STUDY


@pytest.mark.parametrize(
    ("asked", "what"), [("5tu", "2 studies"), ("nope", "no study"), ("%", "no")]
)
def test_an_id_that_fits_no_study_or_several_is_refused(two_studies, asked, what):
    with pytest.raises(PlanError, match=f"^{what}.* with id '{asked}' here; studies: 5tu"):
        find_study(two_studies, asked)


def test_an_empty_id_fits_no_study_even_where_there_is_one(filled):
    with pytest.raises(PlanError, match=f"an empty id names no study; studies: {STUDY}"):
        find_study(filled, "")
