"""Several processes on one database, full disks, lost power and clocks that go back."""

import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from builders.records import STUDY
from builders.rich import DEVICE, fill, measurement, plan, proof
from sqlalchemy import text

from autoquant.errors import StoreError
from autoquant.store import open_store, schema
from autoquant.store.remove import remove_study


def test_a_database_that_others_make_is_neither_damaged_nor_locked(tmp_path):
    def opened(path):
        open_store(path).close()

    with ThreadPoolExecutor(8) as pool:
        for number in range(40):
            list(pool.map(opened, [tmp_path / f"{number}.db"] * 8))


@pytest.mark.processes
def test_what_is_saved_after_the_database_was_opened_a_second_time_is_there(filled, path, query):
    """Another process that closes the database deletes the log, unless this one holds its locks."""
    open_store(path).close()
    look = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM study').fetchall()"
    subprocess.run([sys.executable, "-c", look, str(path)], check=True)
    filled.put_timings(DEVICE, "1", [measurement()])
    assert query("SELECT count(*) FROM timing") == [(1,)]


def test_a_study_that_is_removed_while_it_is_searched_is_said_to_be(filled):
    filled.put_plan(plan())
    remove_study(filled, STUDY)
    for put in (
        lambda: filled.put_plan(plan()),
        lambda: filled.put_proof("abcd0001", proof()),
        lambda: filled.put_reference(STUDY, "judge", {}),
    ):
        with pytest.raises(StoreError, match="perhaps its study was removed meanwhile") as caught:
            put()
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_with_the_database_and_loses_nothing(filled, path):
    with filled.engine.connect() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar()
        connection.execute(text(f"PRAGMA max_page_count = {pages + 4}"))
    kept = 0
    with pytest.raises(StoreError, match="the disk is full: no room for .*plan.db; free some"):  # noqa: RUF043
        for number in range(1, 1000):
            filled.put_timings(DEVICE, "1", [measurement(m=number), measurement(m=2000 + number)])
            kept = number
    with filled.engine.connect() as connection:
        connection.execute(text("PRAGMA max_page_count = 100000"))
    found = {subject.m for subject in filled.timings(DEVICE, "1")}
    assert kept > 0 and found == {m + more for m in range(1, kept + 1) for more in (0, 2000)}
    filled.put_timings(DEVICE, "1", [measurement(m=kept + 1)])


def test_every_transaction_is_on_the_disk_before_it_counts_as_kept(store):
    for _ in range(2):
        store.engine.dispose()
        with store.engine.connect() as connection:
            full = 2
            assert connection.execute(text("PRAGMA synchronous")).scalar() == full


@pytest.mark.parametrize("seed", range(4))
def test_a_log_that_was_cut_off_holds_the_first_facts_whole(filled, path, tmp_path, seed):
    """As after a loss of power while the log was written."""
    for number in range(1, 13):
        filled.put_timings(DEVICE, "1", [measurement(m=number), measurement(m=100 + number)])
    whole = path.with_name("plan.db-wal").read_bytes()
    kept = len(whole) * (seed + 1) // 5 + 37 * seed
    lost = tmp_path / "lost.db"
    shutil.copy(path, lost)
    lost.with_name("lost.db-wal").write_bytes(whole[:kept] + bytes(100))
    connection = sqlite3.connect(lost)
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'timing'").fetchall():
        return connection.close()  # the log was cut before the schema
    connection.close()
    store = open_store(lost)
    found = sorted(subject.m for subject in store.timings(DEVICE, "1"))
    count = len(found) // 2
    assert found == [*range(1, count + 1), *range(101, 101 + count)]
    assert not (seed == 3 and count == 0)
    return store.close()


def test_order_outlives_a_clock_that_is_set_back(filled, monkeypatch):
    filled.put_plan(plan("zzzz"))
    before = schema.now()
    monkeypatch.setattr(schema, "now", lambda: before - timedelta(days=400))
    filled.put_plan(plan("aaaa"))
    fill(filled, "another1")
    assert [each.plan_id for each in filled.plans(STUDY)] == ["zzzz", "aaaa"]
    assert filled.studies() == ["another1", STUDY] and filled.study().study_id == "another1"
    filled.update_study(STUDY, spent_s=1.0)
    assert filled.studies() == [STUDY, "another1"]
