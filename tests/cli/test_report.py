import os

import pytest
from builders.searched import MIXED, STUDY

from autoquant import files
from autoquant.cli.main import app
from autoquant.errors import AutoquantError


def test_it_writes_one_page_and_says_where(runner, database, tmp_path):
    out = tmp_path / "front.html"
    result = runner.invoke(app, ["report", str(database), "--out", str(out)])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"wrote {out}\n")
    page = out.read_text(encoding="utf-8")
    assert (
        page.startswith("<!doctype html>")
        and f"Use plan {MIXED[:6]} (front 1): 1.60 times faster." in page
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front.html", database.name]


def test_what_was_there_is_replaced_and_readable_like_any_file(runner, database, tmp_path):
    out = tmp_path / "report.html"
    out.write_text("old")
    runner.invoke(app, ["report", str(database), "--out", str(out)])
    assert "old" not in out.read_text(encoding="utf-8")[:10]
    (tmp_path / "other").touch()
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_study_may_be_named(runner, database, tmp_path):
    out = tmp_path / "report.html"
    assert (
        runner.invoke(app, ["report", str(database), "--study", STUDY, "--out", str(out)]).exit_code
        == 0
    )
    result = runner.invoke(
        app, ["report", str(database), "--study", "other", "--out", str(tmp_path / "other.html")]
    )
    assert result.exit_code == 2 and "no study 'other' here" in result.stderr
    assert not (tmp_path / "other.html").exists()


@pytest.mark.parametrize(
    ("out", "advice"),
    [
        ("front.txt", "must end in .html"),
        ("missing/report.html", "is not a folder"),
        ("folder.html", "it is a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(runner, database, tmp_path, out, advice):
    (tmp_path / "folder.html").mkdir()
    result = runner.invoke(app, ["report", str(database), "--out", str(tmp_path / out)])
    assert (
        result.exit_code == 2 and advice in result.stderr and len(result.stderr.splitlines()) == 1
    )


def test_a_database_that_is_not_there_is_refused(runner, tmp_path):
    result = runner.invoke(
        app, ["report", str(tmp_path / "none.db"), "--out", str(tmp_path / "report.html")]
    )
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("old")

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(AutoquantError, match="the disk is full: no room for"):
        files.write_file(out, b"new")
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
