import json

from autoquant.cli.main import app
from autoquant.store import open_store

from . import conftest
from .conftest import BLOCKS, MIXED, SHAPES, SMALL, UNPROVEN


def test_json_of_the_recommended_plan_has_every_layer_with_why(runner, database):
    result = runner.invoke(app, ["show", str(database), "--json"])
    shown = json.loads(result.stdout)
    assert shown["plan_id"] == MIXED
    assert shown["recommended"] is True
    assert len(shown["layers"]) == BLOCKS * len(SHAPES)
    assert shown["layers"][0] == {
        "name": "model.layers.0.q_proj",
        "shape": {"n": 256, "k": 256, "bias": False, "dtype": "bf16"},
        "format": "int8-row",
        "route": [{"upper_m": 16, "kernel": "weight-only"}, {"upper_m": None, "kernel": "dynamic"}],
        "numerics": "int8-row:a16",
        "latency_us": {"prefill": 120.0, "decode": 35.5},
        "loss": 0.0001,
        "memory_bytes": 65536,
        "joined": [],
        "reason": "fastest within the limit",
    }
    assert shown["measured_phase_ms"]["prefill"] == 31.25
    assert shown["notes"] == ["timed once only"]
    assert shown["coverage"]["weights_share"] == 0.94
    assert shown["coverage"]["skipped"][0]["reason"] == "not a linear layer"


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
    assert max(map(len, result.stdout.splitlines()[6:])) <= 100


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
    conftest.fill(store, {"max_ppl_increase": 0.01, "max_memory_bytes": 1000})
    store.close()
    result = runner.invoke(app, ["show", str(tmp_path / "plan.db")])
    assert result.exit_code == 2
    assert "no proven plan has" in result.stderr
