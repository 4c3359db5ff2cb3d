"""--verbose logs what is done on stderr, and nothing of it where it is not asked for."""

from __future__ import annotations

import logging

import pytest

from autoquant.cli.main import app
from autoquant.events import Notice, StageFinished, StageProgress, StageStarted, logged
from autoquant.report.progress import listening


@pytest.mark.parametrize("place", ["before", "behind"])
def test_what_is_done_is_logged_on_stderr(runner, database, place):
    arguments = ["pareto", str(database), "--json"]
    quiet = runner.invoke(app, arguments)
    talking = runner.invoke(
        app, ["--verbose", *arguments] if place == "before" else [*arguments, "--verbose"]
    )
    assert talking.exit_code == 0
    assert (quiet.stderr, talking.stdout) == ("", quiet.stdout)
    assert "INFO autoquant.store.connect: opened the database" in talking.stderr
    assert str(database) in talking.stderr


def test_logging_ends_with_the_command(runner, database):
    runner.invoke(app, ["--verbose", "pareto", str(database)])
    assert not logging.getLogger("autoquant").isEnabledFor(logging.INFO)
    assert runner.invoke(app, ["pareto", str(database)]).stderr == ""


def test_events_are_logged_and_told(caplog):
    told = []
    listener = logged(told.append)
    events = [
        StageStarted("timing", 2),
        StageProgress("timing", 1, "int8"),
        StageFinished("timing", "2 timings"),
    ]
    events.append(Notice("a layer was left alone"))
    with caplog.at_level(logging.INFO, "autoquant"):
        for event in events:
            listener(event)
    assert told == events
    assert caplog.messages == [
        "timing: 2 to do",
        "timing: 1 done, now int8",
        "timing: 2 timings",
        "a layer was left alone",
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "INFO", "WARNING"]


def test_what_is_logged_is_not_told_a_second_time(capsys, caplog):
    with caplog.at_level(logging.INFO, "autoquant"), listening() as listener:
        listener(Notice("a layer was left alone"))
    assert capsys.readouterr().err == ""


def test_without_a_program_that_asks_nothing_is_logged(capsys):
    logged(lambda _event: None)(Notice("a layer was left alone"))
    assert capsys.readouterr().err == ""
