"""Several at once, interruptions, removal and merging: the same in a file and on a server."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from builders.records import MODEL, STUDY
from builders.rich import DEVICE, WORKLOAD, fill, measurement, plan, proof, task_score
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from autoquant.errors import PlanError, StoreError
from autoquant.records import Roofline
from autoquant.solver import refine
from autoquant.store import connect, open_store, postgres, schema
from autoquant.store.addresses import shown_address
from autoquant.store.connect import check_address
from autoquant.store.merge import MergedRows, merge
from autoquant.store.remove import remove_study
from autoquant.store.repair import repair
from autoquant.store.transactions import transaction
from autoquant.study.study import Study

BACKENDS = ("sqlite", "postgresql")

ROUNDS = 25


@pytest.fixture
def query_of_server(database):
    """The answer to one statement, which is committed, past our own code."""

    def ask(statement):
        with create_engine(database, poolclass=NullPool).begin() as connection:
            done = connection.execute(text(statement))
            return [tuple(row) for row in done] if done.returns_rows else []

    return ask


def saved_in_rounds(address, worker):
    """Read and write in one transaction each, as every search does; returns the number of rounds."""
    store = open_store(address)
    try:
        for number in range(ROUNDS):
            store.put_device(DEVICE)
            store.update_study(STUDY, spent_s=float(number))
            store.put_reference(STUDY, f"note {worker}", {"round": number})
            store.put_timings(DEVICE, "1", [measurement(m=number + 1)])
    finally:
        store.close()
    return ROUNDS


def test_several_that_write_the_same_facts_at_once_wait_for_each_other(filled, address, query):
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda worker: saved_in_rounds(address, worker), range(4)))
    assert done == [ROUNDS] * 4
    assert query("SELECT count(*) FROM timing") == [(ROUNDS,)]
    assert set(filled.references(STUDY)) == {f"note {worker}" for worker in range(4)}


def test_several_that_make_a_database_at_once_make_one(address):
    def make(_number):
        store = open_store(address)
        fill(store)
        store.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(4)))
    store = open_store(address)
    assert store.studies() == [STUDY]
    store.close()


def test_a_process_that_is_killed_in_the_middle_leaves_nothing_of_its_transaction(
    filled, address, query
):
    code = (
        "import os, sys\n"
        "from builders.rich import DEVICE, measurement\n"
        "from autoquant.store import open_store\n"
        "def measured():\n"
        "    yield measurement(m=1)\n"
        "    yield measurement(m=2)\n"
        "    os._exit(9)\n"
        "open_store(sys.argv[1]).put_timings(DEVICE, '1', measured())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, address], env={"PYTHONPATH": ":".join(filter(None, sys.path))}
    )
    assert done.returncode == 9
    assert query("SELECT count(*) FROM timing") == [(0,)]
    filled.put_timings(DEVICE, "1", [measurement(m=3)])  # no lock is left


def test_a_clock_that_goes_back_does_not_change_the_order(filled, monkeypatch):
    filled.put_plan(plan())
    filled.put_plan(plan("abcd0002"))
    late = schema.now()
    monkeypatch.setattr(schema, "now", lambda: late - timedelta(days=1))
    filled.put_plan(plan("abcd0003"))
    assert [each.plan_id for each in filled.plans(STUDY)] == ["abcd0001", "abcd0002", "abcd0003"]


def test_a_study_is_removed_and_what_belongs_to_the_device_stays(filled):
    filled.put_timings(DEVICE, "1", [measurement()])
    filled.put_plan(plan())
    filled.put_proof("abcd0001", proof())
    filled.put_reference(STUDY, "note", {"a": 1})
    removed = remove_study(filled, STUDY)
    assert (removed.plans, removed.proofs, removed.references) == (1, 1, 1)
    assert filled.studies() == [] and len(filled.timings(DEVICE, "1")) == 1
    with pytest.raises(StoreError, match="lacks what this belongs to"):
        filled.put_plan(plan("abcd0002"))


def test_measurements_of_a_file_are_merged_into_it(store, tmp_path):
    file = tmp_path / "other.db"
    other = open_store(file)
    fill(other)
    other.put_roofline(DEVICE, Roofline(bandwidth_bytes_per_s=1.0, flops_per_s={"int8": 2.0}))
    other.put_timings(DEVICE, "1", [measurement(m=1), measurement(m=2)])
    other.put_losses(MODEL, "text", "isolated", {("a", "int8+a16"): 0.5})
    other.put_task_scores(MODEL, "bfloat16", [task_score(0.5)])
    other.close()
    assert merge(store, file)["timings"] == MergedRows(added=2, known=0)
    assert merge(store, file)["timings"] == MergedRows(added=0, known=2)
    assert len(store.timings(DEVICE, "1")) == 2
    assert store.losses(MODEL, "text", "isolated") == {("a", "int8+a16"): 0.5}


def test_a_count_of_more_than_32_bits_is_kept(filled):
    large = measurement()
    large = replace(large, subject=replace(large.subject, working_set_bytes=1 << 40))
    filled.put_timings(DEVICE, "1", [large])
    assert list(filled.timings(DEVICE, "1")) == [large.subject]


def test_a_study_is_read_by_its_address(filled, address):
    filled.put_plan(plan())
    study = Study.open(address)
    assert study.study_id == STUDY and [each.plan_id for each in study.plans()] == ["abcd0001"]
    with pytest.raises(PlanError, match="no plan with id 'nope'"):
        study.plan("nope")
    study.store.close()
    assert filled.study().workload == WORKLOAD


def test_what_a_reader_sees_is_of_one_moment(filled, address):
    filled.put_timings(DEVICE, "1", [measurement(m=1)])
    writer = open_store(address)
    with transaction(filled.engine) as session:
        before = session.query(schema.TimingRow).count()
        writer.put_timings(DEVICE, "1", [measurement(m=2)])
        assert session.query(schema.TimingRow).count() == before == 1
    assert len(filled.timings(DEVICE, "1")) == 2
    writer.close()


def test_a_password_is_never_shown(database):
    secret = make_url(database).set(password="s3cret").render_as_string(hide_password=False)
    assert "s3cret" in secret and "s3cret" not in shown_address(secret)
    check_address(secret)
    store = open_store(secret)  # the server of the tests asks for none
    with pytest.raises(PlanError) as error:
        store.plan("nope")
    assert "s3cret" not in str(error.value) and "***" in str(error.value)
    store.close()


def test_a_server_that_is_not_there_is_said_in_one_line():
    with pytest.raises(StoreError) as error:
        open_store("postgresql+psycopg://who:s3cret@127.0.0.1:9/none")
    assert "cannot reach postgresql+psycopg://who:***@127.0.0.1:9/none" in str(error.value)
    assert "\n" not in str(error.value) and "s3cret" not in str(error.value)


def test_a_writer_that_never_ends_is_waited_for_and_then_named(database, monkeypatch):
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_S", 0.2)
    store = open_store(database)
    holder = create_engine(database)
    with holder.connect() as connection:
        connection.execute(text(f"SELECT pg_advisory_lock({postgres._WRITERS})"))
        with pytest.raises(StoreError, match=r"another program has kept .* locked"):
            fill(store)
    holder.dispose()
    fill(store)
    assert store.studies() == [STUDY]
    store.close()


def test_a_server_is_named_by_its_usual_url_too(database):
    usual = database.replace("postgresql+psycopg://", "postgresql://")
    store = open_store(usual)
    fill(store)
    store.close()
    study = Study.open(database)
    assert study.study_id == STUDY
    study.store.close()


def test_a_servers_database_is_not_repaired_as_a_file(tmp_path):
    with pytest.raises(StoreError, match="is no file: restore a server's database from a backup"):
        repair("postgresql://who:s3cret@host/db", tmp_path / "new.db")
    assert list(tmp_path.iterdir()) == []


def test_what_only_reads_makes_no_tables_in_an_empty_database(database):
    for _ in range(2):  # the first makes none that the second would find
        with pytest.raises(StoreError, match=r"no store in .* yet; `autoquant search"):
            open_store(database, create=False)


def test_a_user_without_rights_is_told_whom_to_ask(database):
    open_store(database).close()
    engine = create_engine(database, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE ROLE stranger LOGIN"))
    stranger = make_url(database).set(username="stranger").render_as_string(hide_password=False)
    try:
        with pytest.raises(StoreError, match="have its owner grant it"):
            open_store(stranger)
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP ROLE stranger"))
        engine.dispose()


def test_measurements_of_a_server_are_merged_into_a_file(database, tmp_path):
    shared = open_store(database)
    fill(shared)
    shared.put_timings(DEVICE, "1", [measurement(m=1)])
    own = open_store(tmp_path / "own.db")
    assert merge(own, database)["timings"] == MergedRows(added=1, known=0)
    with pytest.raises(StoreError, match="is the database to merge into"):
        merge(shared, database)
    own.close()
    shared.close()


def test_several_that_make_the_tables_of_refinement_at_once_make_them(database):
    def make(_number):
        storage = refine._storage(database)
        storage.remove_session()
        storage.engine.dispose()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(make, range(6)))
    with refine._its_tables_whole(database):
        assert refine._forget(refine._storage(database), "none") is None


def test_tables_of_another_program_are_named_and_left_alone(database, query_of_server):
    query_of_server("CREATE TABLE device (id int)")
    with pytest.raises(
        StoreError, match=r"another program .* \(device\): give a database"
    ) as error:
        open_store(database)
    assert "repair" not in str(error.value)
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    assert query_of_server(tables) == [(1,)]
