"""Plans timed again in the whole model."""

from __future__ import annotations

import json

import pytest

from autoquant.errors import DeviceError
from autoquant.tuner import bench as bench_module
from autoquant.tuner.bench import bench


@pytest.fixture(scope="module")
def uniform(study):
    """The smallest first: one that converts a tied weight to another 16-bit dtype takes more memory than the original."""
    plans = [plan for plan in study.plans() if plan.kind == "uniform"]
    return sorted(plans, key=lambda plan: plan.prediction.memory_bytes)


def test_a_plan_is_timed_in_turn_with_the_unquantized_model(searched, uniform, run):
    result = run("bench", searched.db, "--plan", uniform[0].plan_id, "--json")
    assert result.exit_code == 0, result.stderr
    original, plan = json.loads(result.stdout)
    assert (original["plan_id"], original["label"], original["speedup"]) == (None, "original", 1.0)
    assert (plan["plan_id"], plan["label"]) == (uniform[0].plan_id, uniform[0].label)
    assert plan["speedup"] == pytest.approx(original["request_ms"] / plan["request_ms"])
    assert plan["request_ms"] == pytest.approx(
        plan["phase_ms"]["prefill"] + 4 * plan["phase_ms"]["decode"]
    )
    assert plan["time_to_first_token_ms"] == plan["phase_ms"]["prefill"]
    assert plan["tokens_per_s"] == pytest.approx(1e3 / plan["time_per_token_ms"])
    assert plan["memory_bytes"] < original["memory_bytes"]
    predicted_ms = uniform[0].prediction.request_ms_beside(original["request_ms"])
    assert uniform[0].prediction.original_request_ms > 0 and plan[
        "predicted_request_ms"
    ] == pytest.approx(predicted_ms)
    assert plan["peak_bytes"] is None, "only a GPU says what was allocated beside the weights"


def test_uniform_plans_stand_beside_it_and_the_table_fits_80_columns(searched, uniform, run):
    result = run("bench", searched.db, "--plan", uniform[0].plan_id, "--compare", "uniform")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    table = [line for line in lines if not line.startswith("note: ")]
    assert all(len(line) <= 80 for line in table)
    text = " ".join(result.stdout.split())
    assert "original" in text and text.count("uniform ") >= len(uniform)
    assert "compile: " in result.stderr


def test_python_gives_rows_in_the_order_of_the_plans(searched, study, uniform):
    rows = bench(uniform[::-1], str(searched.model), study.facts)
    assert [row.plan_id for row in rows] == [None, *(plan.plan_id for plan in uniform[::-1])]


def test_the_loop_that_a_user_runs_is_timed_in_turn(searched, uniform, run):
    result = run("bench", searched.db, "--loop", "generate", "--plan", uniform[0].plan_id, "--json")
    assert result.exit_code == 0, result.stderr
    original, plan = json.loads(result.stdout)
    assert (original["plan_id"], original["label"], original["speedup"]) == (None, "original", 1.0)
    assert original["request_ratio"] is None and plan["loop"] == "generate"
    assert plan["plan_id"] == uniform[0].plan_id and plan["memory_bytes"] < original["memory_bytes"]
    assert plan["request_ms"] == pytest.approx(plan["first_token_ms"] + 3 * plan["step_ms"])
    ratio = plan["request_ratio"]
    assert (
        ratio["value"]
        == pytest.approx(plan["request_ms"] / original["request_ms"])
        == 1 / plan["speedup"]
    )
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert plan["tokens_per_s"] == pytest.approx(1e3 / plan["step_ms"])


def test_the_table_of_that_loop_fits_80_columns(searched, uniform, run):
    result = run("bench", searched.db, "--loop", "generate", "--compare", "uniform")
    assert result.exit_code == 0, result.stderr
    assert all(
        len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith("note: ")
    )
    text = " ".join(result.stdout.split())
    assert (
        "Timed in turn: generate, prompt 8 + 4" in text
        and "original" in text
        and "token further" in text
    )
    assert text.count("uniform ") >= len(uniform)


def test_that_loop_has_no_phases_to_attribute(searched, run):
    result = run("bench", searched.db, "--loop", "generate", "--attribute")
    assert result.exit_code == 2 and "are of phases" in result.stderr and result.stdout == ""


def test_every_microsecond_of_a_step_is_attributed_and_the_differences_add_up(
    searched, uniform, run
):
    plan = uniform[0]
    result = run("bench", searched.db, "--plan", plan.plan_id, "--attribute", "--json")
    assert result.exit_code == 0, result.stderr
    original, timed = json.loads(result.stdout)
    assert "attribution" not in original
    steps = timed["attribution"]["steps"]
    assert list(steps) == ["prefill", "decode"]
    for step in steps.values():
        assert sum(part["time_us"] for part in step["parts"]) == pytest.approx(step["step_us"])
        assert set(step["layers_us"]) >= {layer.name for layer in plan.layers}
        assert not any(part["what"] == "not attributed" for part in step["parts"])
    differences = timed["attribution"]["differences"]
    assert sum(each["time_ms"] for each in differences) == pytest.approx(timed["request_ms"])
    assert sum(each["predicted_ms"] for each in differences) == pytest.approx(
        timed["predicted_request_ms"]
    )


def test_the_attribution_is_shown_and_written_as_a_trace(searched, uniform, run, tmp_path):
    trace = tmp_path / "trace.json"
    result = run(
        "bench", searched.db, "--plan", uniform[0].plan_id, "--attribute", "--trace", trace
    )
    assert result.exit_code == 0, result.stderr
    shown = [line for line in result.stdout.splitlines() if not line.startswith("note: ")]
    assert all(len(line) <= 80 for line in shown), max(shown, key=len)
    text = " ".join(result.stdout.split())
    assert "mlp.down_proj" in text and "attention" in text and "gaps" in text
    assert "Slowest kernels" in text and "Largest differences" in text
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"model.layers.1.mlp.down_proj", "attention"} <= {
        event["name"] for event in events if event["ph"] == "X"
    }
    assert f"wrote {trace}" in result.stderr


def test_timings_stand_where_the_profiler_sees_nothing(
    searched, uniform, run, monkeypatch, tmp_path
):
    def blind(*_arguments):
        raise DeviceError("the profiler sees nothing here")

    monkeypatch.setattr(bench_module, "attribute", blind)
    trace = tmp_path / "trace.json"
    result = run(
        "bench", searched.db, "--plan", uniform[0].plan_id, "--attribute", "--trace", trace
    )
    assert result.exit_code == 0, result.stderr
    assert "not attributed: the profiler sees nothing here" in result.stdout and not trace.exists()


def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_timed(
    searched, uniform, run, tmp_path
):
    result = run(
        "bench",
        searched.db,
        "--plan",
        uniform[0].plan_id,
        "--trace",
        tmp_path / "nowhere" / "trace.json",
    )
    assert result.exit_code == 2 and "there is no folder" in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "all"], "'all' is none of uniform, heuristic, bits, front, refined"),
        (["--plan", "ffffffffffff"], "no plan"),
        (["--plan", "UNIFORM", "--model", "/nowhere"], "/nowhere"),
        (["--plan", "ORIGINAL"], "the unquantized model takes part anyway"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_one_line(
    searched, study, uniform, run, arguments, message
):
    ids = {
        "UNIFORM": uniform[0].plan_id,
        "ORIGINAL": next(p.plan_id for p in study.plans() if p.kind == "original"),
    }
    result = run("bench", searched.db, *(ids.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""
