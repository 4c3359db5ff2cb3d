"""A search that is killed or interrupted goes on from what it had, and measures nothing twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import sys
import time

import pytest

from autoquant.events import StageProgress, StageStarted
from autoquant.store import open_store
from autoquant.study.study import Study

from . import quick
from .conftest import FACTS, rows
from .tiny import save_llama, save_text

DEADLINE_S = 60
ENVIRONMENT = (("AUTOQUANT_EAGER", "1"), ("AUTOQUANT_IN_PROCESS", "1"), ("OMP_NUM_THREADS", "1"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(model folder, text file) of an even smaller model."""
    place = tmp_path_factory.mktemp("small")
    return save_llama(place / "model", layers=1), save_text(place / "text.txt", windows=16)


@pytest.fixture(scope="module")
def start():
    """Start a search in a process of its own, which has everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([quick.__name__])
    path = os.pathsep.join(
        filter(None, sys.path)
    )  # the server of Python 3.11 looks for what it preloads only there
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (*ENVIRONMENT, ("PYTHONPATH", path)):
            patch.setenv(name, value)

        def run(*arguments, **options):
            process = context.Process(
                target=quick.search_as_process, args=arguments, kwargs=options
            )
            process.start()
            return process

        yield run


def count(db, table):
    """Rows that others see, 0 where there is no such table yet."""
    try:
        connection = sqlite3.connect(f"file:{db}?mode=ro", uri=True)
    except sqlite3.OperationalError:
        return 0
    try:
        return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        connection.close()


def kill_at(process, db, table, at_least):
    """Kill the process as soon as the table has so many rows; returns whether it was still running."""
    deadline = time.monotonic() + DEADLINE_S
    while process.is_alive() and count(db, table) < at_least:
        assert time.monotonic() < deadline, "the search does not come on"
        time.sleep(0.002)
    process.kill()  # SIGKILL, or nothing where it has just ended
    process.join(DEADLINE_S)
    return process.exitcode == -signal.SIGKILL


def finish(process):
    process.join(DEADLINE_S)
    assert process.exitcode == 0


def without_duplicates(db):
    """The rows, once it is sure that each fact is there once."""
    found = rows(db)
    keys = {
        "timing": [row[1:11] for row in found["timing"]],
        "loss": [row[1:6] for row in found["loss"]],
        "plan": [row[0] for row in found["plan"]],
        "proof": [row[0] for row in found["proof"]],
    }
    for table, own in keys.items():
        assert len(own) == len(set(own)), table
    return found


def assert_kept(earlier, later, tables=FACTS):
    """Rows that were there are there still, as they were: id, numbers and time of making."""
    for table in tables:
        assert set(map(repr, earlier[table])) <= set(map(repr, later[table])), table


@pytest.mark.slow
def test_a_search_killed_at_many_moments_goes_on_and_comes_to_its_end(small, start, tmp_path):
    db = tmp_path / "plan.db"
    moments = [("device", 1), ("timing", 7), ("loss", 3), ("plan", 1), ("proof", 1), ("proof", 3)]
    earlier = None
    killed = 0
    for table, at_least in moments:
        killed += kill_at(start(*small, db), db, table, at_least)
        store = open_store(db)
        store.close()
        found = without_duplicates(db)
        if earlier is not None:
            assert_kept(earlier, found, ("timing", "loss", "proof"))
        earlier = found
    assert killed == len(moments)

    finish(start(*small, db))
    found = without_duplicates(db)
    assert_kept(earlier, found, ("timing", "loss", "proof"))
    study = Study.open(db)
    assert study.facts.complete
    assert {row[0] for row in found["proof"]} == {row[0] for row in found["plan"]}, (
        "no plan is left without its proof"
    )
    kinds = [plan.kind for plan in study.plans()]
    assert (
        kinds.count("original") == 1 and kinds.count("uniform") >= 1 and kinds.count("front") >= 1
    )
    assert study.recommended() is not None
    study.store.close()

    finish(start(*small, db))
    assert rows(db) == found


class InterruptAt:
    """A listener that presses Ctrl-C at the n-th progress of a stage."""

    def __init__(self, stage, number):
        self.stage, self.number = stage, number
        self.seen = 0

    def __call__(self, event):
        if isinstance(event, StageProgress) and event.stage == self.stage:
            self.seen += 1
            if self.seen == self.number:
                raise KeyboardInterrupt


def test_an_interrupted_search_keeps_what_it_measured_and_goes_on(small, tmp_path):
    db = tmp_path / "plan.db"
    earlier = {table: [] for table in FACTS}
    for stage, number, table in (
        ("profile", 5, "timing"),
        ("score", 1, "loss"),
        ("prove", 3, "proof"),
    ):
        with pytest.raises(KeyboardInterrupt):
            quick.search(*small, db, listener=InterruptAt(stage, number))
        found = without_duplicates(db)
        assert len(found[table]) > 0, table
        assert_kept(earlier, found)
        earlier = found
    study = quick.search(*small, db)
    assert study.facts.complete
    assert_kept(earlier, without_duplicates(db), ("timing", "loss", "proof"))


def test_an_interrupted_search_is_not_complete_and_says_so(small, tmp_path):
    from typer.testing import CliRunner

    from autoquant.cli.main import app

    db = tmp_path / "plan.db"
    with pytest.raises(KeyboardInterrupt):
        quick.search(*small, db, listener=InterruptAt("prove", 3))
    result = CliRunner().invoke(app, ["pareto", str(db)])
    assert result.exit_code == 0
    assert "has not come to its end" in result.stdout


def test_a_second_search_with_more_candidates_times_only_the_new_ones(small, tmp_path):
    db = tmp_path / "plan.db"
    first = quick.search(*small, db, candidates=("int8-row/plain/int8pack-mm",))
    before = without_duplicates(db)
    totals = []

    def listener(event):
        if isinstance(event, StageStarted) and event.stage == "profile":
            totals.append(event.total)

    second = quick.search(
        *small, db, candidates=("int8-row/plain/int8pack-mm", "float16*"), listener=listener
    )
    assert second.study_id != first.study_id
    after = without_duplicates(db)
    assert_kept(before, after)
    assert totals == [len(after["timing"]) - len(before["timing"])]
    assert {row[9] for row in after["timing"][len(before["timing"]) :]} == {"matmul"}
