import json
import os
import resource
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from autoquant.cli import main
from autoquant.cli.main import app

COMMANDS = (
    "search", "pareto", "show", "diff", "apply", "bench", "eval", "candidates", "profile", "studies", "rm", "merge",
    "export-timings", "recipes", "report", "generate", "serve", "doctor",
)  # fmt: skip


def autoquant(*arguments, cwd=None, python=(), environment=None):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, *python, "-m", "autoquant.cli.main", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **(environment or {}),
        },
    )


def failing_app(error):
    """A command line with one command that raises `error`."""
    failing = typer.Typer(cls=main.OneLineErrors, rich_markup_mode=None)

    @failing.callback()
    def root() -> None:
        pass

    @failing.command()
    def fail() -> None:
        raise error

    return failing


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(runner, command):
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Options:" in result.stdout


def test_without_a_command_it_shows_its_help(runner):
    result = runner.invoke(app, [])
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.processes
def test_help_is_quick_and_imports_nothing_heavy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = autoquant("--help", python=("-X", "importtime"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0
    assert not imported & {"torch", "pandas", "sqlalchemy", "matplotlib", "plotly", "rich", "numpy"}
    # Of the processor: a busy machine is not the command's fault.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.processes
def test_reading_the_front_does_not_import_torch(database):
    result = autoquant("pareto", str(database), "--json", python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert len(json.loads(result.stdout)) == 4
    assert not imported & {"torch", "pandas", "matplotlib", "plotly"}


@pytest.mark.processes
def test_an_error_is_one_line_with_exit_code_2_and_leaves_no_file(tmp_path):
    result = autoquant("show", "plan.db", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: no database at plan.db")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
@pytest.mark.parametrize(
    "arguments", [("--debug", "show", "plan.db"), ("show", "plan.db", "--debug")]
)
def test_debug_anywhere_shows_the_traceback(tmp_path, arguments):
    result = autoquant(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "error: no database at plan.db" in result.stderr


def test_debug_can_be_asked_for_in_the_environment(tmp_path, monkeypatch, runner):
    monkeypatch.setenv("AUTOQUANT_DEBUG", "1")
    result = runner.invoke(app, ["show", str(tmp_path / "plan.db")])
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["show"],
        ["show", "plan.db", "--nonsense"],
        ["search", "model"],
        ["search", "model", "--eval-text", "t", "--batch", "0"],
        ["search", "model", "--eval-text", "t", "--dtype", "int3"],
        ["search", "model", "--eval-text", "t", "--max-ppl-increase", "-1%"],
        ["search", "model", "--eval-text", "t", "--max-memory", "much"],
        ["search", "model", "--eval-text", "t", "--time-budget", "soon"],
        ["search", "model", "--eval-text", "t", "--workload", "prefill=many"],
        ["profile", "--shapes", "s", "--rows", "many"],
        ["profile", "--shapes", "s", "--workload", "prefill=many"],
        ["profile", "--shapes", "s", "--json", "--csv"],
        ["profile", "--shapes", "s", "--plot", "picture.gif"],
    ],
)
def test_usage_errors_are_one_line_without_boxes(runner, arguments):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_unexpected_errors_are_one_line_with_exit_code_1():
    result = CliRunner().invoke(failing_app(RuntimeError("first\nsecond")), ["fail"])
    assert result.exit_code == 1
    assert (
        result.stderr
        == "error: unexpected RuntimeError: first; run again with --debug for the traceback\n"
    )


def test_a_full_disk_is_one_line_with_exit_code_2():
    error = OSError(28, "No space left on device", "/tmp/x")
    result = CliRunner().invoke(failing_app(error), ["fail"])
    assert result.exit_code == 2
    assert result.stderr == (
        "error: the disk is full: no room for /tmp/x; free some, and the same command goes on\n"
    )


@pytest.mark.processes
def test_an_output_that_does_not_fit_the_disk_is_one_line_with_exit_code_2(database):
    command = f"{sys.executable} -m autoquant.cli.main show {database} --json > /dev/full"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: the disk is full")


def test_an_interrupt_exits_with_130():
    result = CliRunner().invoke(failing_app(KeyboardInterrupt()), ["fail"])
    assert result.exit_code == 130


@pytest.mark.processes
def test_a_reader_that_leaves_causes_no_complaint(database):
    command = f"{sys.executable} -m autoquant.cli.main show {database} --json | head -c 10"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert (len(result.stdout), result.stderr) == (10, "")


@pytest.mark.processes
def test_a_reader_that_leaves_is_told_apart_from_an_unexpected_error(database):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "autoquant.cli.main", "pareto", database],
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.processes
@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-"])
def test_a_stream_that_is_closed_is_no_error(database, closed):
    command = f"{sys.executable} -m autoquant.cli.main studies {database} {closed}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ["n" * 300, f"{'folder/' * 1000}plan.db"])
def test_a_name_that_is_too_long_is_one_line(runner, name):
    result = runner.invoke(app, ["studies", name])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "a name is too long for the file system: " in result.stderr
    assert len(result.stderr) < 200


def test_version_comes_from_the_installed_package(runner, monkeypatch):
    monkeypatch.setattr(main.metadata, "version", lambda name: {"autoquant": "1.2.3"}[name])
    result = runner.invoke(app, ["--version"])
    assert result.stdout == "autoquant 1.2.3\n"


def test_units_can_be_read_where_the_terminal_has_no_greek_letter():
    assert "5 µs → 3 ± 1 行".encode("ascii", errors=main._SPELLED) == b"5 us -> 3 +- 1 ?"
