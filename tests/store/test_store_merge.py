"""Merging databases: keys kept, what is known kept, the other file only read."""

import sqlite3
from dataclasses import replace

import pytest
from builders.records import MODEL, STUDY
from builders.rich import DEVICE, fill, measurement, plan, proof, task_score
from sqlalchemy import text

from autoquant.errors import StoreError
from autoquant.records import Roofline
from autoquant.store import open_store
from autoquant.store.connect import VERSION_TABLE, open_read_only
from autoquant.store.merge import MergedRows, merge

OTHER_DEVICE = replace(DEVICE, name="Other CPU")


def facts(path, latency, rows_m=(1,), losses=("a",)):
    """A database with a study, and timings, losses and a roofline."""
    store = open_store(path)
    fill(store)
    store.put_device(OTHER_DEVICE)
    store.put_roofline(DEVICE, Roofline(bandwidth_bytes_per_s=latency, flops_per_s={"int8": 1 / 3}))
    store.put_timings(DEVICE, "1", [measurement(m=m, latency=latency) for m in rows_m])
    store.put_timings(
        DEVICE,
        "1",
        [measurement(m=m, kernel="other", outcome="failed", reason="no") for m in rows_m],
    )
    store.put_losses(
        MODEL, "text", "isolated", {(layer, "int8+a16"): latency / 3 for layer in losses}
    )
    store.put_plan(plan())
    store.put_proof("abcd0001", proof())
    store.put_task_scores(MODEL, "bfloat16", [task_score(latency / 4)])
    store.put_task_scores("abcd0001", "bfloat16", [task_score(latency / 5)])
    return store


def dump(path, table):
    connection = sqlite3.connect(path)
    try:
        columns = [
            row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[1] != "id"
        ]
        return set(connection.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall())
    finally:
        connection.close()


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other" / "other.db"
    path.parent.mkdir()
    facts(path, latency=2.0, rows_m=(1, 8), losses=("a", "b")).close()
    return path


def test_everything_measured_arrives_in_an_empty_database_and_no_study_does(store, path, other):
    merged = merge(store, other)
    assert merged == {
        "devices": MergedRows(added=2, known=0),
        "rooflines": MergedRows(added=1, known=0),
        "timings": MergedRows(added=4, known=0),
        "models": MergedRows(added=1, known=0),
        "losses": MergedRows(added=2, known=0),
        "task scores": MergedRows(added=1, known=0),
    }
    for table in ("device", "roofline", "timing", "model", "loss"):
        assert dump(path, table) == dump(other, table) != set()
    for table in ("study", "plan", "proof"):
        assert dump(path, table) == set() != dump(other, table)


def test_task_scores_of_the_unquantized_model_travel_and_those_of_plans_stay_with_their_study(
    store, other
):
    merge(store, other)
    assert store.task_scores(MODEL, "bfloat16") == [task_score(0.5)]
    assert store.task_scores("abcd0001", "bfloat16") == []


def test_what_is_there_already_is_kept(path, other):
    store = facts(path, latency=1.0)
    merged = merge(store, other)
    assert merged["timings"] == MergedRows(added=2, known=2)
    assert merged["losses"] == MergedRows(added=1, known=1)
    assert merged["rooflines"] == MergedRows(added=0, known=1)
    times = {
        subject.m: timing.samples_us[0]
        for subject, timing in store.timings(DEVICE, "1").items()
        if timing.samples_us
    }
    assert times == {1: 1.0, 8: 2.0}
    assert store.losses(MODEL, "text", "isolated") == {
        ("a", "int8+a16"): 1 / 3,
        ("b", "int8+a16"): 2 / 3,
    }
    assert store.roofline(DEVICE).bandwidth_bytes_per_s == 1.0
    assert merged["task scores"] == MergedRows(added=0, known=1)
    assert store.task_scores(MODEL, "bfloat16") == [task_score(0.25)]
    assert store.studies() == [STUDY]
    store.close()


def test_merging_again_adds_nothing(store, other):
    first, again = merge(store, other), merge(store, other)
    assert {name: (rows.added, rows.known) for name, rows in again.items()} == {
        name: (0, rows.added) for name, rows in first.items()
    }


def test_the_other_database_keeps_every_byte_even_where_it_cannot_be_written(
    store, other, folder_print
):
    other.chmod(0o444)
    before = folder_print(other.parent)
    merge(store, other)
    assert folder_print(other.parent) == before


def test_what_another_process_has_not_yet_written_back_is_read_too(store, other):
    connection = sqlite3.connect(other)
    connection.execute("UPDATE timing SET m = 4096 WHERE m = 8")
    connection.commit()
    before = other.read_bytes()
    merge(store, other)
    assert {subject.m for subject in store.timings(DEVICE, "1")} == {1, 4096}
    assert other.read_bytes() == before
    connection.close()


def test_a_merge_that_fails_leaves_nothing(store, path, other):
    with store.engine.begin() as connection:
        connection.execute(
            text(
                "CREATE TRIGGER full BEFORE INSERT ON loss BEGIN SELECT RAISE(ABORT, 'disk "
                "full'); END"
            )
        )
    with pytest.raises(StoreError, match="disk full"):
        merge(store, other)
    assert all(
        dump(path, table) == set()
        for table in ("device", "roofline", "timing", "model", "loss", "task_score")
    )


@pytest.mark.parametrize(
    ("revision", "what"), [("9999", "newer autoquant"), ("0001", "older autoquant")]
)
def test_another_schema_is_refused_and_left_alone(store, other, folder_print, revision, what):
    connection = sqlite3.connect(other)
    connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '{revision}'")
    connection.commit()
    connection.close()
    before = folder_print(other.parent)
    with pytest.raises(StoreError, match=what):
        merge(store, other)
    assert folder_print(other.parent) == before
    assert store.studies() == []


def test_a_database_of_another_program_is_refused_and_left_alone(store, tmp_path, folder_print):
    foreign = tmp_path / "other" / "foreign.db"
    foreign.parent.mkdir()
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE timing (id TEXT)")
    connection.commit()
    connection.close()
    before = folder_print(foreign.parent)
    with pytest.raises(StoreError, match="another program"):
        merge(store, foreign)
    assert folder_print(foreign.parent) == before


def test_a_database_opened_for_reading_refuses_to_be_written(other):
    reading = open_read_only(other)
    with pytest.raises(StoreError, match="read-only"):
        reading.put_device(replace(DEVICE, threads=64))
    reading.close()


def test_a_path_with_odd_characters_can_be_read(store, other):
    odd = other.with_name("pl an?#%20ä.db")
    other.rename(odd)
    assert merge(store, odd)["devices"].added == 2
