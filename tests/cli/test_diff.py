import json
from dataclasses import replace

import pytest
from builders import searched
from builders.records import MODEL
from builders.searched import BLOCKS, DEVICE, MIXED, ORIGINAL, SHAPES, SMALL, UNIFORM, UNPROVEN

from autoquant.cli.main import app
from autoquant.store import open_store


def rows_of(text):
    """Rows of the totals by their first words."""
    return {line[:20].strip(): line for line in text.splitlines() if line[:20].strip()}


def test_json_has_every_layer_that_changes_and_what_it_buys(runner, database):
    result = runner.invoke(app, ["diff", str(database), UNIFORM, MIXED, "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (found["before"]["plan_id"], found["after"]["plan_id"]) == (UNIFORM, MIXED)
    assert [change["name"] for change in found["changes"]] == [
        f"model.layers.{block}.{role}" for block in range(2, BLOCKS, 3) for role in SHAPES
    ]
    first = found["changes"][0]
    assert first["before"] == {
        "format": "int8-row",
        "route": [{"upper_m": 16, "kernel": "weight-only"}, {"upper_m": None, "kernel": "dynamic"}],
    }
    assert first["after"] == {"format": "bf16", "route": [{"upper_m": None, "kernel": "torch"}]}
    assert (first["memory_bytes"], first["predicted_loss"]) == (256 * 256, pytest.approx(-0.0001))
    assert found["predicted"]["difference"]["request_ms"] == pytest.approx(-10.0)
    assert found["measured"]["difference"] == {
        "measured_request_ms": pytest.approx(-27.0),
        "perplexity_increase": pytest.approx(-0.002),
        "memory_bytes": 2**22,
    }
    assert found["measured"]["after"]["perplexity_increase_high"] == pytest.approx(0.005)


def test_predicted_microseconds_count_all_calls_of_a_request(runner, database):
    store = open_store(database)
    slow = store.plan(SMALL)
    faster = [
        replace(layer, latency_us={"prefill": 100.0, "decode": 35.0}) for layer in slow.layers
    ]
    store.put_plan(replace(slow, layers=tuple(faster)))
    store.close()
    found = json.loads(
        runner.invoke(app, ["diff", str(database), ORIGINAL, SMALL, "--json"]).stdout
    )
    assert found["changes"][0]["predicted_request_us"] == pytest.approx(-20.0 - 128 * 0.5)


def test_text_folds_layers_and_fits_80_columns(runner, database):
    result = runner.invoke(app, ["diff", str(database), UNIFORM[:4], MIXED[:4]])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert f"{BLOCKS} of {BLOCKS * len(SHAPES)} layers change" in lines[0]
    assert max(map(len, lines)) <= 80
    assert len(lines) < 40, "three kinds of layers change: not a line for each layer"
    assert (
        "-> bf16" in result.stdout
        and "m<=16 weight-only" in result.stdout
        and "10 layers of 256 x 256" in result.stdout
    )
    totals = rows_of(result.stdout)
    assert "150 ms" in totals["Request, predicted"] and "-10.0 ms" in totals["Request, predicted"]
    assert "152 ms" in totals["Request, measured"] and "-27.0 ms" in totals["Request, measured"]
    assert "+0.60%" in totals["Perplexity increase"] and "-0.20%" in totals["Perplexity increase"]
    assert "+0.30..+0.50%" in totals["95% interval"]
    assert "+4.00 MiB" in totals["Memory, measured"]


def test_an_unproven_plan_has_no_measured_rows_and_says_why(runner, database):
    result = runner.invoke(app, ["diff", str(database), SMALL, UNPROVEN])
    assert result.exit_code == 0
    assert "Request, predicted" in result.stdout and "Request, measured" not in result.stdout
    assert f"Plan {UNPROVEN} is not proven (the kernel failed)" in result.stdout
    found = json.loads(
        runner.invoke(app, ["diff", str(database), SMALL, UNPROVEN, "--json"]).stdout
    )
    assert (found["measured"], found["unproven"]) == (None, [UNPROVEN])


def test_a_plan_does_not_differ_from_itself(runner, database):
    result = runner.invoke(app, ["diff", str(database), MIXED, MIXED])
    assert result.exit_code == 0
    assert result.stdout.startswith("No layer changes.")
    assert (
        json.loads(runner.invoke(app, ["diff", str(database), MIXED, MIXED, "--json"]).stdout)[
            "changes"
        ]
        == []
    )


def test_plans_of_two_studies_are_refused_in_one_line(runner, database):
    store = open_store(database)
    workload = store.study().workload
    store.put_study(
        "an0ther", model_hash=MODEL, device=DEVICE, identity={}, workload=workload, limits={}
    )
    alien = searched.plan("ffff00000006", "front 1", "front", ("bf16",), 1.0)
    store.put_plan(replace(alien, study_id="an0ther"))
    store.close()
    result = runner.invoke(app, ["diff", str(database), MIXED, "ffff"])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "compare plans of one study" in result.stderr


def test_an_unknown_plan_is_one_line(runner, database):
    result = runner.invoke(app, ["diff", str(database), MIXED, "zzz"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "no plan with id 'zzz'" in result.stderr
