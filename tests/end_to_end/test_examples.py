"""The examples: a vision transformer and an encoder, trained for a moment and searched with their own loss."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("vision", 19), ("encoder", 20)])
def test_an_example_is_trained_searched_and_applied_as_its_readme_says(
    name, layers, tmp_path, monkeypatch, run
):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "weights.pt", "--steps", "3"])
    importlib.import_module(name).main()
    functions = {"model-factory": "make", "sample-inputs": "inputs", "quality": "loss"}
    named = [
        part
        for option, function in functions.items()
        for part in (f"--{option}", f"{name}:{function}")
    ]
    options = [
        "--db",
        "plan.db",
        "--device",
        "cpu",
        "--candidates",
        "int8-row*",
        "--time-budget",
        "0.5s",
    ]
    result = run("search", "weights.pt", *named, *options)
    assert result.exit_code == 0, result.stderr
    assert f"record: {layers} linears" in result.stderr
    rows = json.loads(run("pareto", "plan.db", "--json").stdout)
    assert {"original", "uniform"} <= {row["kind"] for row in rows} and all(
        row["perplexity"] is None for row in rows
    )
    quantized = next(row["plan_id"] for row in rows if row["kind"] == "uniform")
    code = named[:4]  # the loss is not needed any more
    applied = run("apply", "plan.db", "--plan", quantized, "--out", "quantized", *code)
    assert applied.exit_code == 0 and "bit for bit" in applied.stdout, applied.stderr
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"--{option} {name}:{function}" in readme for option, function in functions.items())


@pytest.mark.processes
def test_the_demo_times_a_saved_model_beside_the_unquantized_one(searched, study, tmp_path, run):
    plan = next(plan for plan in study.plans() if plan.kind == "uniform")
    assert (
        run("apply", searched.db, "--plan", plan.plan_id, "--out", tmp_path / "quantized").exit_code
        == 0
    )
    options = ["--model", searched.model, "--workload", "prefill=8,decode=4", "--eager"]
    command = [sys.executable, ROOT / "demo" / "compare.py", tmp_path / "quantized", *options]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()][:4] == [
        "original",
        "prefill",
        "decode",
        "request",
    ]
