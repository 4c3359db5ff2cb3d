"""What a person is asked at a terminal, and what text of others can do to it."""

from __future__ import annotations

import csv
import io
import os
import pty
import re
import select
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from autoquant.cli import trust
from autoquant.report.visible import visible

from .conftest import done, refused, run

GOLDEN = Path(__file__).parent.parent / "golden" / "finished.sqlite"
STEERING = "$\\no{$\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[link=http://x]<script>alert(1)</script>"


def test_a_yes_at_the_terminal_runs_what_was_shown(owned, monkeypatch):
    monkeypatch.setattr(trust, "at_terminal", lambda: True)
    result = run("apply", owned.db, "--out", "out", stdin="y\n")
    assert result.exit_code == 0, result.output
    assert f"runs what is pickled in {owned.place / 'net.pt'}" in result.stderr
    assert f"imports owners_net:inputs from {owned.place / 'owners_net.py'}" in result.stderr
    assert result.stderr.count("[y/N]") == 1, "asked once for all"


@pytest.mark.parametrize("answer", ["\n", "n\n", "yes please\n", ""])
def test_anything_but_yes_runs_nothing(owned, monkeypatch, answer):
    monkeypatch.setattr(trust, "at_terminal", lambda: True)
    result = run("apply", owned.db, "--out", "out", stdin=answer)
    assert result.exit_code == 2 and "add --trust-pickle --sample-inputs" in result.stderr
    assert not Path("out").exists()


def test_without_a_terminal_nobody_is_asked(owned):
    result = run("apply", owned.db, stdin="y\n")
    assert result.exit_code == 2 and "[y/N]" not in result.stderr


@pytest.mark.processes
def test_a_real_terminal_is_recognised(evil, tmp_path, marker):
    (tmp_path / "others.toml").write_text('quality = "evil:run"\n')
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-P",
        "-m",
        "autoquant",
        "search",
        "model",
        "--recipe",
        "others.toml",
    ]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while b"[y/N]" not in shown and select.select([ours], [], [], 120)[0]:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
        os.write(ours, b"\n")
        assert process.wait(60) == 2, shown
    os.close(ours)
    assert b"--quality evil:run, which the recipe names" in shown
    assert not marker.exists()


@pytest.fixture
def others(tmp_path):
    """A finished study, each text of which tries to steer the terminal and the page."""
    path = tmp_path / "plan.db"
    shutil.copy(GOLDEN, path)
    with sqlite3.connect(path) as connection:
        escaped = STEERING.encode("unicode_escape").decode().replace("\\x", "\\u00")
        for table, column in [("model", "source"), ("device", "fingerprint")]:
            rows = connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall()
            for rowid, text in rows:
                text = re.sub(r'("(?:path|name)": ")', lambda m: m[1] + escaped, text)
                connection.execute(
                    f"UPDATE {table} SET {column} = ? WHERE rowid = ?", [text, rowid]
                )
        connection.execute("UPDATE plan SET label = label || ?", [STEERING])
    connection.close()
    return path


COMMANDS = [
    ("studies",),
    ("pareto",),
    ("pareto", "--chart"),
    ("pareto", "--json"),
    ("pareto", "--csv"),
    ("show",),
    ("export-timings",),
    ("solve", "--max-ppl-increase", "50%"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_text_of_a_database_cannot_steer_the_terminal(others, command):
    name, *options = command
    result = run(name, others, *options)
    assert result.exit_code == 0, result.output
    for shown in (result.stdout, result.stderr):
        assert not set("\x1b\x07\x9b\u202e") & set(shown)
    assert "owned" in result.stdout, "it is shown all the same"


def test_text_of_a_database_is_no_code_in_the_report(others, tmp_path):
    done("report", others, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page


def test_text_of_a_database_is_no_code_in_a_picture(others, tmp_path):
    done("pareto", others, "--plot", tmp_path / "front.svg")
    assert "<script>alert" not in (tmp_path / "front.svg").read_text()


def test_names_of_shapes_are_no_code_in_a_page(tmp_path):
    (tmp_path / "shapes.txt").write_text("32x32 <script>alert(1)</script>\n")
    given = ("--rows", "1", "--candidates", "int8-row/plain/int8pack-mm", "--db", tmp_path / "t.db")
    page = tmp_path / "page.html"
    done("profile", "--shapes", tmp_path / "shapes.txt", *given, "--plot", page)
    assert "alert(1)" in page.read_text() and "<script>alert" not in page.read_text()


def test_an_error_cannot_steer_the_terminal(tmp_path):
    assert "\x1b" not in refused("show", tmp_path / "\x1b[2Jplan.db")


def test_a_line_of_a_csv_stays_a_line(others):
    rows = list(csv.reader(io.StringIO(done("pareto", others, "--csv"))))
    assert len({len(row) for row in rows}) == 1


def test_only_what_steers_is_written_out():
    assert visible("ä\t→ 中\n") == "ä\t→ 中\n"
    assert visible("\x1b[31m\r\x00\u202e") == "\\x1b[31m\\r\\x00\\u202e"
