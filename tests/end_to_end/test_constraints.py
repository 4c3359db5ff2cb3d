"""Layers kept, pinned and for an engine, from the command line; and the search solved again without its model."""

from __future__ import annotations

import json

import pytest

from autoquant.engines import engine
from autoquant.records import Numerics
from autoquant.solver.constraints import scheme_of
from autoquant.study.study import Study

from .conftest import WORKLOAD, copy_database, typed

KEPT, PINNED = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"
CONSTRAINTS = ("--keep", KEPT, "--pin", "*.1.*.k_proj=int8-row*", "--for", "vllm")
Q, K, V = (f"model.layers.1.self_attn.{name}_proj" for name in "qkv")


@pytest.fixture(scope="module")
def constrained(files, tmp_path_factory):
    """(model, text, database, arguments of the search), searched."""
    model, text = files
    db = tmp_path_factory.mktemp("constrained") / "plan.db"
    arguments = [
        "search",
        model,
        "--eval-text",
        text,
        "--db",
        db,
        "--device",
        "cpu",
        "--workload",
        WORKLOAD,
    ]
    arguments += [
        "--time-budget",
        "1s",
        *CONSTRAINTS,
    ]
    result = typed(*arguments, "--max-kl", "0.5", "--max-ppl-increase", "50%", "--json")
    assert result.exit_code == 0, result.stderr
    return model, text, db, arguments, result


def formats(plan):
    return {layer.name: layer.format for layer in plan.layers}


def test_every_plan_but_the_original_honours_them(constrained):
    study = Study.open(constrained[2])
    plans = [plan for plan in study.plans() if plan.kind != "original"]
    assert len(plans) >= 5
    for plan in plans:
        chosen = formats(plan)
        assert chosen[KEPT] == "bfloat16/plain" and chosen[K].startswith("int8-row"), plan.label
        same = {layer.name: scheme_of(layer) for layer in plan.layers}
        assert same[Q] == same[K] == same[V], plan.label
        assert same["model.layers.0.mlp.gate_proj"] == same["model.layers.0.mlp.up_proj"], (
            plan.label
        )
        reasons = {layer.name: layer.reason for layer in plan.layers}
        assert f"kept unquantized by --keep {KEPT}" in reasons[KEPT]
        assert "pinned by --pin *.1.*.k_proj=int8-row*" in reasons[K]


def test_every_plan_is_one_that_the_engine_holds_exactly(constrained):
    study = Study.open(constrained[2])
    plans = [plan for plan in study.plans() if plan.kind != "original"]
    layers = [layer for plan in plans for layer in plan.layers]
    for layer in layers:
        numerics = Numerics.parse(layer.numerics)
        held = numerics.values, numerics.activation, layer.shape
        assert engine("vllm").refuses(*held, device="cpu") is None, layer.format
    assert not any(layer.format.startswith("int4-") for layer in layers)
    assert "for vllm: left out int4-g32, int4-g64, int4-g128" in constrained[-1].stderr


def test_the_original_which_fails_a_pin_is_shown_and_not_recommended(constrained):
    study = Study.open(constrained[2])
    assert "original" in {row["kind"] for row in study.rows()}
    assert study.best().kind != "original"
    assert study.best(max_ppl_increase=0.5, max_kl=0.5).kind != "original"


def test_they_are_said_wherever_the_study_is_shown(constrained, run):
    *_, db, _, result = constrained
    wanted = {"keep": [KEPT], "pin": ["*.1.*.k_proj=int8-row*"], "engine": "vllm"}
    printed = json.loads(result.stdout)
    assert printed["constraints"] == wanted and printed["limits"]["max_kl"] == 0.5
    assert f"1 of 15 layers kept unquantized by --keep {KEPT}" in result.stderr
    assert "for vllm: 10 layers get the scheme of those that it computes as one" in result.stderr
    assert json.loads(run("show", db, "--json").stdout)["constraints"] == wanted
    assert json.loads(run("studies", db, "--json").stdout)[0]["constraints"] == wanted
    for shown in (run("show", db), run("pareto", db)):
        assert f"Constraints: --keep {KEPT} --pin *.1.*.k_proj=int8-row* --for vllm" in shown.stdout
    assert "--for vllm" in run("studies", db).stdout


def test_the_divergence_is_measured_on_the_selection_part_with_its_interval(constrained):
    study = Study.open(constrained[2])
    for plan_id, proof in study.proofs().items():
        assert proof.selection_kl.low <= proof.selection_kl.value <= proof.selection_kl.high
        assert proof.selection_kl.value == pytest.approx(proof.kl, rel=0.8, abs=1e-9), study.plan(
            plan_id
        ).label
        assert len(proof.selection_losses) > 1
        assert (
            proof.time_ratio.low
            <= proof.request_ms / proof.original_request_ms
            <= proof.time_ratio.high
        )


def test_it_is_solved_again_when_the_model_is_gone_and_the_plan_can_be_applied(
    constrained, run, tmp_path
):
    model, _, db, *_ = constrained
    copy = tmp_path / "plan.db"
    copy_database(db, copy)
    away = model.rename(model.with_name("away"))
    try:
        result = run("solve", copy, "--max-kl", "0.002", "--json")
        text = run("solve", copy, "--max-kl", "0.003", "--max-memory", "1GB")
    finally:
        away.rename(model)
    assert result.exit_code == text.exit_code == 0, (result.stderr, text.stderr)
    solved = json.loads(result.stdout)
    plan = Study.open(copy).plan(solved["plan"]["plan_id"])
    assert formats(plan)[KEPT] == "bfloat16/plain" and formats(plan)[Q] == formats(plan)[K]
    assert solved["limits"]["max_kl"] == 0.002 and len(solved["around"]) >= 1
    assert f"autoquant apply {copy} --plan" in text.stdout
    of_search = json.loads(run("solve", copy, "--json").stdout)
    assert of_search["limits"] == Study.open(copy).limits.as_object()
    applied = run("apply", copy, "--plan", plan.plan_id, "--out", tmp_path / "out")
    assert applied.exit_code == 0, applied.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep", "nothing"], "no searched layer matches 'nothing'"),
        (["--pin", "lm_head=int8*", "--keep", "lm_head"], "contradict each other"),
        (["--max-kl", "little"], "write nats per token such as 0.02"),
        (["--max-memory", "10"], "allow at least that with --max-memory"),
    ],
)
def test_what_cannot_be_met_ends_with_one_line_and_exit_code_2(constrained, run, options, words):
    _, _, db, arguments, _ = constrained
    before = {row["plan_id"] for row in Study.open(db).rows()}
    base = arguments[: -len(CONSTRAINTS)] if "--max-memory" not in options else arguments
    result = run(*base, *options)
    assert result.exit_code == 2 and words in result.stderr.splitlines()[-1], result.stderr
    assert {row["plan_id"] for row in Study.open(db).rows()} == before


def test_solve_refuses_limits_that_nothing_meets(constrained, run):
    result = run("solve", constrained[2], "--max-memory", "10")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "no plan is as small as 10 bytes" in result.stderr
