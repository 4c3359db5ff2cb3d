"""Embeddings searched from the command line: solved, proven, shown, applied, loaded, generated."""

from __future__ import annotations

import json

import pytest

from autoquant.records import LOOKUP
from autoquant.solver.tied import shares
from autoquant.study.study import Study

from .conftest import WORKLOAD, command, copy_database, python, typed

TABLE, HEAD = "model.embed_tokens", "lm_head"
EVERYTHING = ("--max-ppl-increase", "900%", "--minimize", "memory")


def arguments_of(files, db):
    model, text = files
    base = ("search", model, "--eval-text", text, "--db", db, "--device", "cpu")
    globs = ("--candidates", "int8-row/*", "--candidates", "int4-g32/lanes")
    return [*base, "--workload", WORKLOAD, *globs, "--time-budget", "1s"]


@pytest.fixture(scope="module")
def found(files, tmp_path_factory):
    """(database, result of a search for memory)."""
    db = tmp_path_factory.mktemp("tables") / "plan.db"
    result = typed(*arguments_of(files, db), "--embeddings", *EVERYTHING, "--json")
    assert result.exit_code == 0, result.stderr
    return db, result


def pair_of(plan):
    layers = {layer.name: layer for layer in plan.layers}
    return layers[HEAD], layers[TABLE]


def test_the_smallest_plan_has_one_tensor_for_table_and_head(found):
    study = Study.open(found[0])
    best = study.best(max_ppl_increase=9.0, minimize="memory")
    head, table = pair_of(best)
    assert table.is_table and table.numerics.endswith(f"+{LOOKUP}")
    assert shares(table, head) and table.memory_bytes == 0 and table.format != "bfloat16/plain"
    assert study.proofs()[best.plan_id].memory_bytes == best.prediction.memory_bytes
    original = next(plan for plan in study.plans() if plan.kind == "original")
    assert study.proofs()[original.plan_id].memory_bytes == original.prediction.memory_bytes


def test_every_proof_takes_the_bytes_that_were_predicted(found):
    study = Study.open(found[0])
    proofs = study.proofs()
    pairs = set()
    for plan in study.plans():
        if plan.plan_id in proofs:
            pairs.add(tuple(layer.format for layer in pair_of(plan)))
            assert proofs[plan.plan_id].memory_bytes == plan.prediction.memory_bytes, plan.label
    assert len(pairs) >= 2


def test_the_search_says_what_the_table_may_become(found):
    line = next(line for line in found[1].stderr.splitlines() if f"table {TABLE}" in line)
    assert f"tied to {HEAD}: bfloat16/plain, int8-row/plain, int4-g32/lanes" in line


def test_show_says_that_table_and_head_are_one_tensor(found):
    shown = typed("show", found[0])
    assert shown.exit_code == 0, shown.stderr
    assert "lookup" in shown.stdout and "one tensor with" in shown.stdout
    layers = json.loads(typed("show", found[0], "--json").stdout)["layers"]
    assert next(layer for layer in layers if layer["name"] == TABLE)["tied"] == HEAD


def test_an_applied_plan_is_loaded_and_generates_in_new_processes(found, tmp_path):
    applied = command("apply", found[0], "--out", tmp_path / "out")
    assert applied.returncode == 0, applied.stderr
    code = (
        "import sys, autoquant; model = autoquant.load(sys.argv[1]);"
        "print(model.lm_head.weight is model.model.embed_tokens.weight)"
    )
    assert python("-c", code, tmp_path / "out").stdout.strip().endswith("True")
    spoken = command("generate", tmp_path / "out", "--prompt", "w1 w2", "--max-new-tokens", "4")
    assert spoken.returncode == 0, spoken.stderr


def test_a_table_can_be_kept_and_pinned_by_name(files, tmp_path):
    kept = typed(
        *arguments_of(files, tmp_path / "kept.db"), "--embeddings", *EVERYTHING,
        "--keep", TABLE, "--pin", f"{HEAD}=int8-row*", "--json",
    )  # fmt: skip
    assert kept.exit_code == 0, kept.stderr
    study = Study.open(tmp_path / "kept.db")
    formats = {
        tuple(layer.format for layer in pair_of(plan))
        for plan in study.plans()
        if plan.kind != "original"
    }
    assert formats == {("int8-row/plain", "bfloat16/plain")}


def test_engines_whose_files_hold_no_quantized_embedding_are_refused(files, tmp_path):
    result = typed(*arguments_of(files, tmp_path / "plan.db"), "--embeddings", "--for", "vllm")
    assert result.exit_code == 2 and "--embeddings and --for vllm" in result.stderr
    assert not (tmp_path / "plan.db").exists()


def test_solving_for_an_engine_leaves_the_table_unquantized(found, tmp_path):
    db = copy_database(found[0], tmp_path / "copy.db")
    solved = typed("solve", db, "--max-ppl-increase", "900%", "--for", "transformers")
    assert solved.exit_code == 0, solved.stderr
    (plan,) = (plan for plan in Study.open(db).plans() if plan.label.startswith("solved for"))
    assert pair_of(plan)[1].format == "bfloat16/plain"
