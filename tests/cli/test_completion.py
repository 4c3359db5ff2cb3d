"""Completion by the shell: installed as typer does it, for commands, options and ids of plans."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from builders.searched import MIXED, SMALL

pytestmark = pytest.mark.processes


def autoquant(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "autoquant", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
    )


def completed(line):
    """What bash would offer at the end of a line."""
    words = line.split(" ")
    result = autoquant(
        _AUTOQUANT_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1)
    )
    return result.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_shown(shell):
    result = autoquant("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert result.returncode == 0, result.stderr
    assert "_AUTOQUANT_COMPLETE" in result.stdout


def test_commands_and_options_are_completed():
    assert completed("autoquant par") == ["pareto"]
    assert "--max-ppl-increase" in completed("autoquant search --max")


def test_ids_of_plans_are_completed_from_the_database_on_the_line(database):
    offered = completed(f"autoquant show {database} --plan ")
    assert {MIXED, SMALL} <= set(offered)
    assert completed(f"autoquant show {database} --plan {SMALL[:6]}") == [SMALL]


def test_without_a_database_no_ids_are_offered(tmp_path):
    assert completed(f"autoquant show {tmp_path}/nowhere.db --plan ") == []
    assert not list(tmp_path.iterdir())
