import hashlib

import pytest
from builders.searched import DEVICE

from autoquant.cli.main import app
from autoquant.records import LinearShape, Measurement, TimingSubject
from autoquant.store import open_store

SHAPE = LinearShape(n=256, k=256, bias=False, dtype="bf16")


def put(path, *all_m, latency_us=1.0):
    store = open_store(path)
    store.put_device(DEVICE)
    subjects = (
        TimingSubject(
            shape=SHAPE, m=m, format="bf16/plain", kernel="torch", working_set_bytes=2**20
        )
        for m in all_m
    )
    store.put_timings(
        DEVICE,
        "1",
        [Measurement(subject=each, outcome="ok", samples_us=(latency_us,)) for each in subjects],
    )
    store.close()
    return path


@pytest.fixture
def other(tmp_path):
    return put(tmp_path / "other.db", 1, 16, 256)


def test_it_says_what_was_added_and_what_was_known(runner, database, other):
    put(database, 1)
    result = runner.invoke(app, ["merge", str(database), str(other)])
    assert result.exit_code == 0
    assert [line.rsplit(maxsplit=4) for line in result.stdout.splitlines()] == [
        ["devices", "0", "added", "1", "known"],
        ["rooflines", "0", "added", "0", "known"],
        ["timings", "2", "added", "1", "known"],
        ["models", "0", "added", "0", "known"],
        ["losses", "0", "added", "0", "known"],
        ["task scores", "0", "added", "0", "known"],
    ]
    store = open_store(database)
    assert sorted(subject.m for subject in store.timings(DEVICE, "1")) == [1, 16, 256]
    store.close()


def test_the_other_database_keeps_every_byte_and_gets_no_file_beside_it(runner, database, other):
    before = hashlib.sha256(other.read_bytes()).hexdigest()
    assert runner.invoke(app, ["merge", str(database), str(other)]).exit_code == 0
    assert hashlib.sha256(other.read_bytes()).hexdigest() == before
    assert sorted(path.name for path in other.parent.iterdir()) == ["other.db", "plan.db"]


def test_a_database_is_not_merged_into_itself_under_whatever_name(runner, database):
    link = database.parent / "link.db"
    link.symlink_to(database)
    for name in (database, link):
        result = runner.invoke(app, ["merge", str(database), str(name)])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "name another one" in result.stderr


def test_a_missing_other_database_is_one_line_and_stays_missing(runner, database, tmp_path):
    result = runner.invoke(app, ["merge", str(database), str(tmp_path / "nowhere.db")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "no database at" in result.stderr
    assert not (tmp_path / "nowhere.db").exists()


def test_help_says_that_studies_are_not_copied(runner):
    help_text = " ".join(runner.invoke(app, ["merge", "--help"]).stdout.split())
    assert "Studies, with their plans, proofs and task scores, are not copied" in help_text
