import os
import pty
import sqlite3
import subprocess
import sys

import pytest
from builders.records import MODEL
from builders.searched import DEVICE, MIXED, STUDY

from autoquant.cli.main import app
from autoquant.records import LinearShape, Measurement, TaskScore, TimingSubject, Workload
from autoquant.store import open_store

SHAPE = LinearShape(n=256, k=256, bias=False, dtype="bf16")
SCORE = TaskScore(
    task="arc", metric="acc", value=0.5, stderr=None, samples=9, limit=None, lm_eval_version="0.4"
)
SUBJECT = TimingSubject(
    shape=SHAPE, m=1, format="bf16/plain", kernel="torch", working_set_bytes=2**20
)


@pytest.fixture
def measured(database):
    """The finished search with a timing, a loss and task scores beside it."""
    store = open_store(database)
    store.put_timings(
        DEVICE, "1", [Measurement(subject=SUBJECT, outcome="ok", samples_us=(1.0, 2.0))]
    )
    store.put_losses(MODEL, "text", "isolated", {("model.layers.0.q_proj", "int8-row:a16"): 0.5})
    for subject in (MODEL, MIXED):
        store.put_task_scores(subject, "bf16", [SCORE])
    store.close()
    return database


def counts(database):
    connection = sqlite3.connect(database)
    tables = ("study", "plan", "proof", "timing", "loss", "model", "device", "task_score")
    try:
        return {
            name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
            for name in tables
        }
    finally:
        connection.close()


def test_a_study_goes_with_its_plans_and_proofs_and_measurements_stay(runner, measured):
    result = runner.invoke(app, ["rm", str(measured), STUDY, "--yes"])
    assert result.exit_code == 0
    assert f"Removed study {STUDY} (tiny-model on Test CPU" in result.stdout
    assert "5 plans, 5 proofs" in result.stdout
    assert "Optuna" not in result.stdout
    assert "1 task scores of its plans" in result.stdout
    left = {
        "study": 0,
        "plan": 0,
        "proof": 0,
        "timing": 1,
        "loss": 1,
        "model": 1,
        "device": 1,
        "task_score": 1,
    }
    assert counts(measured) == left
    assert [path.name for path in measured.parent.iterdir()] == ["plan.db"]


def test_the_beginning_of_an_id_will_do(runner, measured):
    assert runner.invoke(app, ["rm", str(measured), STUDY[:4], "--yes"]).exit_code == 0
    assert counts(measured)["study"] == 0


def test_an_ambiguous_beginning_removes_nothing_and_lists_the_ids(runner, measured):
    store = open_store(measured)
    other = f"{STUDY[:6]}zzzz"
    store.put_study(
        other,
        model_hash=MODEL,
        device=DEVICE,
        identity={},
        workload=Workload.parse("decode=1"),
        limits={},
    )
    store.close()
    result = runner.invoke(app, ["rm", str(measured), STUDY[:6], "--yes"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert (
        "2 studies with id" in result.stderr and STUDY in result.stderr and other in result.stderr
    )
    assert counts(measured)["study"] == 2


def test_an_empty_id_removes_nothing(runner, measured):
    result = runner.invoke(app, ["rm", str(measured), "", "--yes"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "an empty id names no study" in result.stderr and STUDY in result.stderr
    assert counts(measured)["study"] == 1


def test_an_unknown_id_is_one_line(runner, measured):
    result = runner.invoke(app, ["rm", str(measured), "nope", "--yes"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"no study with id 'nope' here; studies: {STUDY}" in result.stderr


def test_without_a_terminal_it_wants_yes_and_removes_nothing(runner, measured):
    before = counts(measured)
    result = runner.invoke(app, ["rm", str(measured), STUDY], input="y\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "say --yes" in result.stderr
    assert counts(measured) == before


@pytest.mark.processes
@pytest.mark.parametrize(("answer", "left"), [("n", 1), ("y", 0)])
def test_on_a_terminal_it_asks_and_does_what_is_answered(measured, answer, left):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "autoquant.cli.main", "rm", str(measured), STUDY],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    os.write(ours, f"{answer}\n".encode())
    said, asked = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0
    assert f"Remove study {STUDY}" in asked and "5 plans?" in asked
    assert said.startswith("Nothing was removed." if left else "Removed study")
    assert counts(measured)["study"] == left
