"""Keys and values in 8 bits: searched, timed, scored, applied, loaded and used by `generate`."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import autoquant
from autoquant.runtime.generate.kv_codes import kv_cache_of

from . import quick


@pytest.fixture(scope="module")
def found(tmp_path_factory, files):
    """A search that also tries both formats."""
    model, text = files
    db = tmp_path_factory.mktemp("kv") / "plan.db"
    with quick.short():
        study = autoquant.search(
            model,
            eval_text=text,
            db=db,
            device="cpu",
            workload="prefill=8,decode=4",
            candidates=["int8-row/plain*"],
            max_ppl_increase=None,
            kv_cache="auto",
        )
    return study, db, model


def plan_with(study, kind):
    proven = study.proofs()
    return next(p for p in study.plans() if p.kv_cache == kind and p.plan_id in proven)


def test_a_search_proves_both_formats_and_shows_what_a_sequence_takes(found, run):
    study, db, _ = found
    proofs = study.proofs()
    sizes = {kind: proofs[plan_with(study, kind).plan_id].kv_bytes for kind in ("int8", "float8")}
    heads, layers, width, tokens = 2, 2, 16, 12
    assert set(sizes.values()) == {2 * layers * heads * (width + 4) * tokens}
    original = next(plan for plan in study.plans() if plan.kind == "original")
    assert proofs[original.plan_id].kv_bytes == 2 * layers * heads * 2 * width * tokens
    shown = run("pareto", db)
    assert shown.exit_code == 0 and "Keys," in shown.stdout
    assert "float8 cache" in " ".join(shown.stdout.split())
    rows = json.loads(run("pareto", db, "--json").stdout)
    assert {row["kv_cache"] for row in rows} == {None, "int8", "float8"}


def test_a_plan_is_applied_with_its_cache_and_every_loader_uses_it(found, run, tmp_path):
    study, db, _ = found
    plan = plan_with(study, "int8")
    out = tmp_path / "out"
    result = run("apply", db, "--plan", plan.plan_id, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "Keys and values in int8, when it generates" in result.stdout
    assert json.loads((out / "autoquant.json").read_text())["kv_cache"] == "int8"
    assert kv_cache_of(autoquant.load(out)) == "int8"
    assert kv_cache_of(autoquant.load(out, kv_cache="off")) is None
    model = AutoModelForCausalLM.from_pretrained(out)
    assert kv_cache_of(model) == "int8"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False)
    assert made.shape[1] <= 7
    autoquant.prepare(model, kv_cache="float8")
    model.save_pretrained(tmp_path / "again")
    assert kv_cache_of(autoquant.load(tmp_path / "again")) == "float8"


def test_apply_says_what_was_not_proven(found, run, tmp_path):
    study, db, _ = found
    plan = next(plan for plan in study.plans() if plan.kind == "uniform")
    result = run(
        "apply", db, "--plan", plan.plan_id, "--kv-cache", "float8", "--out", tmp_path / "o"
    )
    assert result.exit_code == 0, result.stderr
    assert (
        "proven with keys and values in bfloat16, and is applied with them in float8"
        in result.stdout
    )
    assert kv_cache_of(autoquant.load(tmp_path / "o")) == "float8"


def test_generate_takes_it_for_an_unquantized_model_too(files, run):
    model, _ = files
    how = ("--prompt", "w1 w2 w3", "--max-new-tokens", "5")
    result = run("generate", model, "--kv-cache", "int8", *how)
    assert result.exit_code == 0, result.stderr
    assert "keys and values in int8: for 8 tokens" in result.stdout
    told = json.loads(run("generate", model, "--kv-cache", "int8", *how, "--json").stdout)
    assert told["kv_cache"] == "int8" and told["kv_cache_bytes"] == 2 * 2 * 2 * 20 * 8


def test_bench_times_each_model_with_and_without(found, run):
    study, db, _ = found
    plan = next(plan for plan in study.plans() if plan.kind == "uniform")
    result = run("bench", db, "--plan", plan.plan_id, "--kv-cache", "int8", "--json")
    assert result.exit_code == 0, result.stderr
    rows = {row["label"]: row for row in json.loads(result.stdout)}
    assert list(rows) == [
        "original",
        plan.label,
        "original, int8 cache",
        f"{plan.label}, int8 cache",
    ]
    assert rows["original, int8 cache"]["kv_cache_bytes"] < rows["original"]["kv_cache_bytes"]
    assert rows["original, int8 cache"]["memory_bytes"] == rows["original"]["memory_bytes"]


def test_eval_scores_long_windows_with_and_without(found, files, run):
    _, db, _ = found
    options = ("--kv-cache", "int8", "--context", "48", "--eval-text", files[1])
    result = run("eval", db, *options, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["kv_cache"] for row in rows] == [None, "int8"] * (len(rows) // 2)
    first, second = rows[:2]
    assert first["increase"] is None and first["tokens"] == 48 and first["windows"] == 8
    assert second["perplexity"] != first["perplexity"]
    assert second["increase"]["value"] == pytest.approx(
        second["perplexity"] / first["perplexity"] - 1
    )
    text = " ".join(run("eval", db, *options).stdout.split())
    assert "8 windows of 48 tokens" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "9"], "needs --kv-cache"),
        (["--kv-cache", "int8", "--tasks", "piqa"], "cannot be combined with --tasks"),
        (["--kv-cache", "int8", "--context", "900"], "the model has 64"),
        (["--kv-cache", "int4"], "int4"),
    ],
)
def test_what_does_not_go_together_is_refused(found, run, options, message):
    result = run("eval", found[1], *options)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
