import contextlib
import json
import sqlite3
from dataclasses import replace

import pytest
from builders import searched
from builders.searched import BLOCKS, MIXED, SHAPES, SMALL, STUDY, UNIFORM, UNPROVEN, delivery

from autoquant.cli.main import app
from autoquant.store import open_store


def test_json_of_the_recommended_plan_has_every_layer_with_why(runner, database):
    result = runner.invoke(app, ["show", str(database), "--json"])
    shown = json.loads(result.stdout)
    assert shown["plan_id"] == MIXED
    assert shown["recommended"] is True
    assert len(shown["layers"]) == BLOCKS * len(SHAPES)
    assert shown["layers"][0] == {
        "name": "model.layers.0.q_proj",
        "shape": {"n": 256, "k": 256, "bias": False, "dtype": "bf16"},
        "experts": 1,
        "format": "int8-row",
        "route": [{"upper_m": 16, "kernel": "weight-only"}, {"upper_m": None, "kernel": "dynamic"}],
        "numerics": "int8-row:a16",
        "latency_us": {"prefill": 120.0, "decode": 35.5},
        "loss": 0.0001,
        "memory_bytes": 65536,
        "joined": [],
        "tied": "",
        "reason": "fastest within the limit",
        "alternatives": None,
    }
    assert shown["measured_phase_ms"]["prefill"] == 31.25
    assert shown["notes"] == ["timed once only"]
    assert shown["coverage"]["weights_share"] == 0.94
    assert shown["coverage"]["skipped"][0]["reason"] == "not a linear layer"


def test_what_the_user_gets_stands_behind_the_name(runner, database, deliver):
    deliver(delivery(MIXED, 0.5), delivery(UNIFORM, reason="RuntimeError: it cannot be moved"))
    lines = runner.invoke(app, ["show", str(database)]).stdout.splitlines()
    assert lines[1].startswith(f"Plan {MIXED}")
    assert lines[2].startswith(
        "As you will run it (generate, prompt 512 + 128): 400 ms -> 200 ms a request, 2.00 times"
    )
    shown = json.loads(runner.invoke(app, ["show", str(database), "--json"]).stdout)
    assert shown["as_run_request_ms"] == 200.0 and shown["not_recommended"] == ""
    refused = runner.invoke(app, ["show", str(database), "--plan", UNIFORM]).stdout
    assert (
        f"Not recommended: plan {UNIFORM} (uniform int8-row): RuntimeError: it cannot be moved"
        in refused
    )


def test_a_plan_is_found_by_the_beginning_of_its_id(runner, database):
    result = runner.invoke(app, ["show", str(database), "--plan", SMALL[:4], "--json"])
    assert json.loads(result.stdout)["plan_id"] == SMALL


def test_text_groups_alike_layers_and_shows_the_coverage(runner, database):
    result = runner.invoke(app, ["show", str(database)])
    assert result.exit_code == 0
    assert "prefill 31.2 ms (unquantized 50.0 ms)" in result.stdout
    assert "m<=16" in result.stdout
    assert "94.00% of the weights" in result.stdout
    assert "97.00% in decode" in result.stdout
    assert "model.layers.0-29.conv" in result.stdout
    assert len(result.stdout.splitlines()) < 80, "90 layers must not take 90 blocks"
    assert (
        max(len(line) for line in result.stdout.splitlines()[6:] if "autoquant bench" not in line)
        <= 100
    )


def test_a_plan_that_was_predicted_badly_comes_with_the_command_that_says_why(runner, database):
    shown = runner.invoke(app, ["show", str(database), "--plan", MIXED]).stdout
    assert f"autoquant bench {database} --plan {MIXED} --attribute" in shown
    assert (
        "--attribute" not in runner.invoke(app, ["show", str(database), "--plan", UNIFORM]).stdout
    )


def test_a_plan_that_could_not_be_proven_says_why(runner, database):
    result = runner.invoke(app, ["show", str(database), "--plan", UNPROVEN])
    assert result.exit_code == 0
    assert "Not proven: the kernel failed" in result.stdout


def test_an_unknown_plan_is_one_line(runner, database):
    result = runner.invoke(app, ["show", str(database), "--plan", "zzz"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "no plan with id 'zzz'" in result.stderr


def test_without_a_plan_within_the_limits_it_says_so(runner, tmp_path):
    store = open_store(tmp_path / "plan.db")
    searched.fill(store, {"max_ppl_increase": 0.01, "max_memory_bytes": 1000})
    store.close()
    result = runner.invoke(app, ["show", str(tmp_path / "plan.db")])
    assert result.exit_code == 2
    assert "no proven plan has" in result.stderr


@pytest.fixture
def solved(database):
    """The finished search with what its plans were solved from: unquantized, int8 and int4 for every layer."""
    store = open_store(database)
    shapes = {choice.name: (choice.shape.n, choice.shape.k) for choice in store.plan(MIXED).layers}
    int4 = {"latency_us": {"prefill": 100.0, "decode": 30.0}, "loss": 0.01}
    bf16 = {"latency_us": {"prefill": 200.0, "decode": 60.0}}
    store.put_options(
        STUDY,
        [
            [
                replace(searched.layer(name, shape, "bf16"), **bf16),
                searched.layer(name, shape, "int8-row"),
                replace(searched.layer(name, shape, "int4-g32"), **int4),
            ]
            for name, shape in shapes.items()
        ],
    )
    store.close()
    return database


def test_json_says_what_the_next_better_and_the_next_cheaper_choice_would_change(runner, solved):
    shown = json.loads(runner.invoke(app, ["show", str(solved), "--json"]).stdout)
    better, cheaper = shown["layers"][0]["alternatives"]
    assert better == {
        "gains": ["more exact"],
        "format": "bf16",
        "route": [{"upper_m": None, "kernel": "torch"}],
        "numerics": "bf16:a16",
        "joined": [],
        "request_us": pytest.approx(80.0 + 128 * 24.5),
        "loss": pytest.approx(-0.0001),
        "memory_bytes": 65536,
    }
    assert (cheaper["format"], cheaper["gains"]) == ("int4-g32", ["faster"])
    assert cheaper["request_us"] == pytest.approx(-20.0 - 128 * 5.5)


def test_json_of_a_search_that_kept_no_options_has_null(runner, database):
    shown = json.loads(runner.invoke(app, ["show", str(database), "--json"]).stdout)
    assert {layer["alternatives"] for layer in shown["layers"]} == {None}


def test_why_is_a_further_table(runner, solved):
    plain = runner.invoke(app, ["show", str(solved)]).stdout
    result = runner.invoke(app, ["show", str(solved), "--why"])
    assert result.exit_code == 0
    assert "Instead" not in plain and "Instead" in result.stdout
    table = result.stdout[result.stdout.index("Layers, and their choice") :].splitlines()
    assert max(map(len, table[:20])) <= 80
    assert any("more exact:" in line for line in table) and any("faster:" in line for line in table)


def test_why_of_a_search_that_kept_no_options_says_so(runner, database):
    result = runner.invoke(app, ["show", str(database), "--why"])
    assert result.exit_code == 0
    assert "The database does not hold the alternatives of the layers" in result.stdout


def test_why_of_layers_computed_as_one_says_what_is_not_counted(runner, solved):
    store = open_store(solved)
    mixed = store.plan(MIXED)
    names = tuple(layer.name for layer in mixed.layers[:2])
    layers = tuple(
        replace(layer, joined=names) if layer.name in names else layer for layer in mixed.layers
    )
    store.put_plan(replace(mixed, layers=layers))
    store.close()
    note = "the cost of a change to the other layers is not counted"
    assert note in runner.invoke(app, ["show", str(solved), "--why"]).stdout
    assert note not in runner.invoke(app, ["show", str(solved), "--why", "--plan", SMALL]).stdout


def constrain(database, constraints):
    """Let the study have been searched under these."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        identity = json.dumps({"constraints": constraints})
        connection.execute("UPDATE study SET identity = ?", [identity])


def test_a_study_of_an_earlier_version_is_shown_with_its_fusable_layers(runner, database):
    constrain(database, {"keep": ["lm_head"], "fusable": "vllm"})
    shown = runner.invoke(app, ["show", str(database)])
    assert shown.exit_code == 0
    assert "Constraints: --keep lm_head --fusable vllm" in shown.stdout
    assert "Made for" not in shown.stdout
    as_json = json.loads(runner.invoke(app, ["show", str(database), "--json"]).stdout)
    assert as_json["constraints"] == {"keep": ["lm_head"], "fusable": "vllm"}
    studies = runner.invoke(app, ["studies", str(database)])
    assert "--fusable vllm" in studies.stdout


def test_the_engine_of_a_study_is_shown_with_what_exports_the_plan(runner, database):
    constrain(database, {"engine": "vllm"})
    shown = runner.invoke(app, ["show", str(database)]).stdout
    assert "Constraints: --for vllm" in shown
    assert f"autoquant export {database} --plan {MIXED} --to compressed-tensors" in shown
