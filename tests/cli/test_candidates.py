import json
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

import autoquant
from autoquant.cli.main import app
from autoquant.errors import DeviceError


@dataclass(frozen=True)
class Status:
    format: str
    kernel: str
    numerics: str
    description: str
    usable: bool
    reason: str
    by_default: bool = True


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Three candidates, one of which cannot be used and one is opt-in, on a machine with a CPU only."""
    known, models = ModuleType("autoquant.candidates"), ModuleType("autoquant.models")

    def resolve_device(name):
        if name not in ("auto", "cpu"):
            raise DeviceError(f"no {name} here")
        return "cpu"

    known.survey = lambda device_type: [
        Status("int8-row", "weight-only", "int8-row:a16", f"int8 on {device_type}", True, ""),
        Status("float8-row", "scaled-mm", "float8-row:a8", "float8", False, "needs a GPU [sm89]"),
        Status("mxfp8", "emulated", "a-mxfp8", "mxfp8", True, "", by_default=False),
    ]
    models.resolve_device = resolve_device
    for name, module in (("candidates", known), ("models", models)):
        monkeypatch.setitem(sys.modules, f"autoquant.{name}", module)
        monkeypatch.setattr(autoquant, name, module, raising=False)


def test_json_says_of_each_whether_it_is_usable_and_why_not(runner):
    result = runner.invoke(app, ["candidates", "--json"])
    assert json.loads(result.stdout)[1] == {
        "format": "float8-row",
        "kernel": "scaled-mm",
        "numerics": "float8-row:a8",
        "description": "float8",
        "usable": False,
        "reason": "needs a GPU [sm89]",
        "by_default": True,
    }
    assert [status["by_default"] for status in json.loads(result.stdout)] == [True, True, False]


def test_text_shows_the_reason_as_it_is(runner):
    result = runner.invoke(app, ["candidates", "--device", "cpu"])
    assert "2 of 3 candidates can be used on cpu, 1 of them (opt-in) only where" in result.stdout
    assert "needs a GPU [sm89]" in result.stdout


def test_a_device_that_is_not_there_is_one_line(runner):
    result = runner.invoke(app, ["candidates", "--device", "cuda"])
    assert (result.exit_code, result.stderr) == (2, "error: no cuda here\n")
