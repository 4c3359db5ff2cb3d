"""`autoquant search` with a driver that only notes how it was called."""

import json

import pytest
from builders.searched import MIXED, ORIGINAL, SMALL, STUDY, fill

from autoquant.cli.main import app
from autoquant.errors import ModelError
from autoquant.records import Workload
from autoquant.store import open_store
from autoquant.study.study import Study


def test_options_reach_the_driver_as_values(runner, driver):
    options = [
        "--eval-text", "text.txt", "--db", "my.db", "--device", "cpu", "--dtype", "bf16", "--batch", "4",
        "--workload", "prefill=128,decode=64", "--max-ppl-increase", "0.5%", "--max-memory", "2GiB",
        "--candidates", "int8*", "--candidates", "int4*", "--time-budget", "90s", "--seed", "7",
        "--model-factory", "a.b:c", "--tokenizer", "tok", "--trust-pickle", "--fuse", "--minimize", "memory",
        "--workers", "2", "--embeddings", "--kv-cache", "int8",
    ]  # fmt: skip
    result = runner.invoke(app, ["search", "model", *options])
    assert result.exit_code == 0, result.stderr
    call = driver.calls[0]
    call.pop("listener")
    assert call == {
        "model": "model",
        "eval_text": "text.txt",
        "eval_data": None,
        "quality": None,
        "sample_inputs": None,
        "db": "my.db",
        "device": "cpu",
        "dtype": "bf16",
        "workload": Workload.parse("prefill=128,decode=64", 4),
        "batch": 4,
        "max_ppl_increase": pytest.approx(0.005),
        "max_memory_bytes": 2**31,
        "minimize": "memory",
        "max_kl": None,
        "keep": (),
        "pin": (),
        "engine": None,
        "fuse": True,
        "candidates": ("int8*", "int4*"),
        "time_budget_s": 90.0,
        "sensitivity": None,
        "seed": 7,
        "model_factory": "a.b:c",
        "tokenizer": "tok",
        "trust_pickle": True,
        "trust_remote_code": False,
        "workers": "2",
        "embeddings": True,
        "kv_cache": "int8",
    }


def test_workers_that_make_no_sense_are_refused_before_anything_is_loaded(runner, driver):
    result = runner.invoke(app, ["search", "model", "--workers", "many"])
    assert result.exit_code == 2 and driver.calls == []
    assert "--workers many: give a number of processes" in result.stderr


def test_a_quality_of_ones_own_needs_no_text(runner, driver):
    result = runner.invoke(
        app, ["search", "model.pt", "--quality", "a.b:loss", "--sample-inputs", "a.b:inputs"]
    )
    assert result.exit_code == 0, result.stderr
    call = driver.calls[0]
    assert (call["eval_text"], call["quality"], call["sample_inputs"]) == (
        None,
        "a.b:loss",
        "a.b:inputs",
    )


def test_a_model_is_all_that_must_be_given(runner, driver):
    result = runner.invoke(app, ["search", "model"])
    assert result.exit_code == 0, result.stderr
    assert {driver.calls[0][name] for name in ("eval_text", "eval_data", "quality")} == {None}


def test_a_dataset_reaches_the_driver_as_it_is_written(runner, driver):
    assert (
        runner.invoke(app, ["search", "model", "--eval-data", "org/name:en:test:body"]).exit_code
        == 0
    )
    assert driver.calls[0]["eval_data"] == "org/name:en:test:body"


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            ["--eval-text", "text.txt", "--quality", "a:b"],
            "--eval-text: cannot be combined with --quality",
        ),
        (
            ["--eval-data", "d.csv", "--eval-text", "text.txt"],
            "--eval-text: cannot be combined with --eval-data",
        ),
        (
            ["--eval-data", "d.csv", "--quality", "a:b"],
            "--eval-data: cannot be combined with --quality",
        ),
        (
            ["--eval-data", "d.csv", "--quality", "a:b", "--eval-text", "t"],
            "--eval-text: cannot be combined with --eval-data and --quality",
        ),
    ],
)
def test_a_model_is_judged_by_one_thing_only(runner, driver, options, advice):
    result = runner.invoke(app, ["search", "model", *options])
    assert (
        result.exit_code == 2 and advice in result.stderr and len(result.stderr.splitlines()) == 1
    )
    assert driver.calls == []


def test_defaults_are_those_of_the_issue(runner, driver):
    runner.invoke(app, ["search", "model", "--eval-text", "text.txt"])
    call = driver.calls[0]
    assert (call["db"], call["device"], call["dtype"], call["workload"]) == (
        "plan.db",
        "auto",
        "auto",
        None,
    )
    assert (call["max_ppl_increase"], call["time_budget_s"], call["candidates"]) == (
        0.01,
        600.0,
        ("*",),
    )


def test_it_ends_with_the_front_the_recommendation_and_the_next_commands(runner, driver):
    result = runner.invoke(app, ["search", "model", "--eval-text", "text.txt"])
    assert "uniform int8-row" in result.stdout
    assert (
        f"Recommended: plan {MIXED} (front 1)\n  Not timed yet as you will run it" in result.stdout
    )
    assert "perplexity +0.40%, 95% interval +0.30..+0.50%" in result.stdout
    assert "autoquant pareto plan.db" in result.stdout
    assert "  autoquant apply plan.db" in result.stdout.splitlines()


def test_plans_that_were_predicted_badly_come_with_the_command_that_says_why(runner, driver):
    result = runner.invoke(app, ["search", "model", "--eval-text", "text.txt"])
    assert "differ by more than 10%: front 2 +20%, front 1 +12%." in result.stdout
    assert f"autoquant bench plan.db --plan {SMALL} --plan {MIXED} --attribute" in result.stdout


def test_json_is_alone_on_stdout_and_progress_goes_to_stderr(runner, driver):
    result = runner.invoke(app, ["search", "model", "--eval-text", "text.txt", "--json"])
    printed = json.loads(result.stdout)
    assert (printed["study_id"], printed["database"]) == (STUDY, "plan.db")
    assert printed["recommended"]["plan_id"] == MIXED
    assert printed["recommended"]["measured_request_ms"] == pytest.approx(125.0)
    assert result.stderr == "note: a layer was left alone\ntiming: 2 timings\n"


def test_an_interrupt_says_that_nothing_is_lost(runner, driver):
    driver.error = KeyboardInterrupt()
    result = runner.invoke(app, ["search", "model", "--eval-text", "text.txt"])
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == (
        "interrupted: everything measured so far is kept in plan.db; the same command goes on from there"
    )


def test_an_error_of_the_search_is_one_line_after_the_progress(runner, driver):
    driver.error = ModelError("no model at model")
    result = runner.invoke(app, ["search", "model", "--eval-text", "text.txt"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: no model at model"


def test_values_are_checked_before_anything_is_searched(runner, driver):
    runner.invoke(app, ["search", "model", "--eval-text", "text.txt", "--max-ppl-increase", "lots"])
    assert driver.calls == []


def test_without_a_plan_within_the_limits_the_recommendation_is_null(
    runner, driver, tmp_path, monkeypatch
):
    store = open_store(tmp_path / "tight.db")
    fill(store, {"max_ppl_increase": 0.01, "max_memory_bytes": 1000})
    monkeypatch.setattr(driver, "search", lambda *_args, **_options: Study(store))
    as_json = runner.invoke(app, ["search", "model", "--eval-text", "text.txt", "--json"])
    as_text = runner.invoke(app, ["search", "model", "--eval-text", "text.txt"])
    assert json.loads(as_json.stdout)["recommended"] is None
    assert "No proven plan is within the limits" in as_text.stdout
    assert ORIGINAL[:6] in as_text.stdout


def test_the_sensitivity_reaches_the_driver(runner, driver):
    from autoquant.evaluators.sensitivity import SENSITIVITIES

    for name in SENSITIVITIES:
        assert (
            runner.invoke(app, ["search", "m", "--eval-text", "t", "--sensitivity", name]).exit_code
            == 0
        )
    assert [call["sensitivity"] for call in driver.calls] == list(SENSITIVITIES)
    assert runner.invoke(app, ["search", "m", "--eval-text", "t"]).exit_code == 0
    assert driver.calls[-1]["sensitivity"] is None


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--eval-text", "t", "--sensitivity", "guess"], "'guess'"),
        (["--quality", "a:b", "--sensitivity", "fisher"], "with --quality only isolated works"),
    ],
)
def test_a_sensitivity_that_does_not_fit_is_refused(runner, driver, options, advice):
    result = runner.invoke(app, ["search", "m", *options])
    assert result.exit_code == 2 and advice in result.stderr and not driver.calls


def test_the_study_keeps_the_command_that_it_came_from(runner, driver, database):
    runner.invoke(app, ["search", "model", "--eval-text", "text.txt", "--batch", "3"])
    options = Study.open(database).store.references(STUDY)["command"]["options"]
    assert (
        options["model"] == "model"
        and options["batch"] == 3
        and options["max-ppl-increase"] == "1%"
    )
