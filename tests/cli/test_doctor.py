"""`autoquant doctor`: one screen, JSON, and the exit code."""

import json
from types import SimpleNamespace

import pytest

from autoquant.cli.main import app
from autoquant.tuner import doctor
from autoquant.tuner.doctor import Checkup, Problem, Steadiness


@pytest.fixture
def found(monkeypatch):
    """What the machine is found to be; a test may add problems."""
    problems = []

    def examine(device):
        return Checkup(
            device=device,
            facts={"machine": "Linux"},
            usable={"bfloat16": ["matmul"]},
            unusable={},
            clock=Steadiness(0.01, 1.1),
            problems=problems,
        )

    monkeypatch.setattr(doctor, "examine", examine)
    return SimpleNamespace(problems=problems)


def test_a_machine_that_works_gives_0_and_one_that_does_not_2(runner, found):
    assert runner.invoke(app, ["doctor", "--device", "cpu"]).exit_code == 0
    found.problems.append(Problem("the machine is loud", "wear ear plugs"))
    assert runner.invoke(app, ["doctor", "--device", "cpu"]).exit_code == 0
    found.problems.append(Problem("torch is missing", "pip install torch", stops=True))
    result = runner.invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 2
    assert "a search on cpu does not work here" in result.stdout
    assert "torch is missing: pip install torch" in result.stdout


@pytest.mark.parametrize("width", [40, 80])
def test_no_line_is_wider_than_the_terminal(runner, found, width):
    found.problems.append(Problem("the machine is loud", "wear ear plugs, " * 10))
    result = runner.invoke(app, ["doctor", "--device", "cpu"], env={"COLUMNS": str(width)})
    assert max(map(len, result.stdout.splitlines())) <= width


def test_json_says_the_same(runner, found):
    found.problems.append(Problem("torch is missing", "pip install torch", stops=True))
    result = runner.invoke(app, ["doctor", "--device", "cpu", "--json"])
    made = json.loads(result.stdout)
    assert (result.exit_code, made["works"]) == (2, False)


def test_a_device_that_is_not_there_is_refused_in_one_line(runner):
    result = runner.invoke(app, ["doctor", "--device", "xpu"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
