"""`autoquant profile` with timings that are made up: options, interruption, and what is refused before anything is timed."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

import autoquant.profiler
from autoquant.cli.main import app
from autoquant.errors import ModelError
from autoquant.events import Notice, StageFinished, StageStarted
from autoquant.models import ModelRequest
from autoquant.records import Workload
from autoquant.tuner.profile_request import ProfileRequest


@pytest.fixture
def timing(monkeypatch):
    """A stand-in for `autoquant.tuner.profile`, whose `requests` are the options it got."""
    module = ModuleType("autoquant.tuner.profile")
    module.requests = []
    module.error = None

    def time_linears(request, listener):
        module.requests.append(request)
        listener(StageStarted("profile", 2))
        listener(Notice("a candidate failed"))
        listener(StageFinished("profile", "2 timings"))
        if module.error is not None:
            raise module.error
        return SimpleNamespace(rows=({"n": 8, "latency_us": 1.5},))

    module.time_linears = time_linears
    monkeypatch.setitem(sys.modules, "autoquant.tuner.profile", module)
    monkeypatch.setattr(autoquant.profiler, "profile", module, raising=False)
    return module


def test_options_reach_the_timing_as_values(runner, timing):
    options = [
        "--db", "my.db", "--device", "cpu", "--dtype", "bf16", "--batch", "4", "--rows", "16,1",
        "--workload", "prefill=128,decode=64", "--candidates", "int8*", "--candidates", "int4*",
        "--model-factory", "a.b:c", "--tokenizer", "tok", "--trust-pickle",
    ]  # fmt: skip
    result = runner.invoke(app, ["profile", "model", *options, "--json"])
    assert result.exit_code == 0, result.stderr
    model = ModelRequest(
        model="model",
        device="cpu",
        dtype="bf16",
        model_factory="a.b:c",
        tokenizer="tok",
        trust_pickle=True,
    )
    expected = ProfileRequest(
        linears=model,
        rows=(1, 16),
        workload=Workload.parse("prefill=128,decode=64", 4),
        batch=4,
        candidates=("int8*", "int4*"),
        db="my.db",
    )
    assert timing.requests == [expected]


def test_shapes_reach_the_timing_in_place_of_a_model(runner, timing):
    assert (
        runner.invoke(app, ["profile", "--shapes", "s.txt", "--dtype", "fp16", "--json"]).exit_code
        == 0
    )
    (request,) = timing.requests
    assert (request.linears.shapes, request.linears.dtype) == ("s.txt", "fp16")


@pytest.mark.parametrize("given", [["model", "--shapes", "s.txt"], []])
def test_either_a_model_or_shapes_is_timed(runner, timing, given):
    result = runner.invoke(app, ["profile", *given])
    assert (result.exit_code, timing.requests) == (2, [])
    assert "give either a model or shapes" in result.stderr


def test_defaults_leave_rows_and_workload_to_the_timing(runner, timing):
    runner.invoke(app, ["profile", "model", "--json"])
    (request,) = timing.requests
    assert (request.rows, request.workload) == (None, None)
    assert (request.db, request.linears) == ("timings.db", ModelRequest(model="model"))
    assert request.candidates == ("*",)


def test_json_is_alone_on_stdout_and_progress_goes_to_stderr(runner, timing):
    result = runner.invoke(app, ["profile", "model", "--json"])
    assert json.loads(result.stdout) == [{"n": 8, "latency_us": 1.5}]
    assert result.stderr == "note: a candidate failed\nprofile: 2 timings\n"


def test_an_interrupt_says_that_nothing_is_lost(runner, timing):
    timing.error = KeyboardInterrupt()
    result = runner.invoke(app, ["profile", "model"])
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == (
        "interrupted: everything measured so far is kept in timings.db; the same command goes on from there"
    )


def test_an_error_is_one_line_after_the_progress(runner, timing):
    timing.error = ModelError("no model at model")
    result = runner.invoke(app, ["profile", "model"])
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, "error: no model at model")


@pytest.mark.parametrize(
    "options",
    [
        ["--rows", "many"],
        ["--workload", "soon"],
        ["--plot", "a.gif"],
        ["--plot", "no/a.png"],
        ["--json", "--csv"],
    ],
)
def test_values_are_checked_before_anything_is_timed(runner, timing, options):
    assert runner.invoke(app, ["profile", "model", *options]).exit_code == 2
    assert timing.requests == []
