"""Layers that read the same input, computed as one: searched, applied, saved, loaded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import autoquant
from autoquant.candidates.flat import flatten_tensor
from autoquant.candidates.joined import whole_of
from autoquant.cli.main import app
from autoquant.delivery.applier import apply, module_bytes
from autoquant.delivery.on_disk import apply_to_disk
from autoquant.devices.cpu import CpuBackend
from autoquant.events import Notice
from autoquant.models import load_model
from autoquant.profiler import entrant
from autoquant.profiler.measure import cells_of
from autoquant.records import RouteStep
from autoquant.runtime import parts
from autoquant.store import open_store
from autoquant.tuner.fusion import sibling_sites

from . import quick
from .conftest import copy_database, rows

IDS = torch.arange(12).unsqueeze(0)
PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten._weight_int8pack_mm.default,
    torch.ops.aten._int_mm.default,
)


def is_product(target):
    return target in PRODUCTS or str(target).startswith("autoquant.cpu_int8_")


@pytest.fixture(scope="module")
def fused(study):
    """The uniform int8 plan with its siblings joined."""
    plan = next(
        p for p in study.plans() if p.kind == "uniform" and p.label.endswith("int8-row a16")
    )
    by_name = {layer.name: layer for layer in plan.layers}
    for names, _ in sibling_sites(study.facts.recording.sites):
        for name in names:
            by_name[name] = replace(by_name[name], route=by_name[names[0]].route, joined=names)
    return replace(plan, layers=tuple(by_name[layer.name] for layer in plan.layers))


def logits(module):
    with torch.no_grad():
        return module(IDS).logits


def apart(plan):
    return replace(plan, layers=tuple(replace(layer, joined=()) for layer in plan.layers))


@pytest.fixture
def fused_db(searched, fused, tmp_path):
    """A store with that plan, and the plan."""
    db = copy_database(searched.db, tmp_path / "plan.db")
    plan = replace(fused, plan_id="f05ed0000000", label="fused")
    open_store(db).put_plan(plan)
    return db, plan


@pytest.mark.slow
def test_a_search_that_fuses_times_the_siblings_shapes_too_and_is_a_study_of_its_own(
    files, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        CpuBackend, "compile_failure", lambda _backend: None
    )  # as if models were compiled, which takes a minute
    monkeypatch.setattr(entrant, "_compile", lambda traced, _example: traced)
    model, text = files
    db = tmp_path / "plan.db"
    alone = quick.search(model, text, db)
    before = rows(db)["timing"]
    study = quick.search(model, text, db, fuse=True)
    assert study.study_id != alone.study_id
    sites = study.facts.recording.sites
    groups = dict(sibling_sites(sites))
    assert sorted(len(names) for names in groups) == [2, 2, 3, 3]
    new = len(rows(db)["timing"]) - len(before)
    assert new == len(set(cells_of(list(groups.values()))) - set(cells_of(sites))) * len(
        quick.CANDIDATES
    )
    proven = study.proofs()
    assert len(proven) >= 3 and not study.store.failed_proofs(study.study_id)
    for plan in study.plans():
        for layer in plan.layers:
            assert layer.joined in {(), *groups}


def test_where_nothing_is_compiled_nothing_is_computed_as_one_and_a_notice_says_so(files, tmp_path):
    model, text = files
    heard = []
    study = quick.search(model, text, tmp_path / "plan.db", fuse=True, listener=heard.append)
    assert not any(layer.joined for plan in study.plans() for layer in plan.layers)
    notices = [event.text for event in heard if isinstance(event, Notice)]
    assert "layers are not computed as one, since torch.compile does that" in notices


def test_joined_weights_lie_behind_one_another_and_compute_the_same(files, fused):
    model, _ = files
    alone, together = (load_model(str(model), device="cpu").module for _ in range(2))
    apply(apart(fused), alone)
    apply(fused, together)
    assert torch.equal(logits(alone), logits(together)) and module_bytes(alone) == module_bytes(
        together
    )
    attention = together.model.layers[0].self_attn
    starts = [
        whole_of(linear.weight.data).start
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    assert starts == [0, 64, 96] and whole_of(attention.o_proj.weight.data) is None
    assert set(alone.state_dict()) == set(together.state_dict())


def test_a_saved_model_has_the_original_names_and_is_joined_again_when_it_is_loaded(
    files, fused, study, tmp_path
):
    model, _ = files
    report = apply_to_disk(fused, model, tmp_path / "out", facts=study.facts)
    assert (report.needs_module, report.generates) == (False, True)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {name for name in names if "k_proj" in name} and not any("+" in name for name in names)
    loaded = autoquant.load(tmp_path / "out")
    mlp = loaded.model.layers[1].mlp
    assert whole_of(mlp.up_proj.weight.data).start == 128
    parts = [flatten_tensor(linear.weight.data)[0][0] for linear in (mlp.gate_proj, mlp.up_proj)]
    assert parts[0].untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("fmt", ["int8-row/plain", "float8-row/plain"])
def test_fusion_is_undone_in_what_is_saved_for_others_to_read(files, fused, study, fmt, tmp_path):
    route = (RouteStep(upper_m=None, kernel="dequantize-matmul"),)
    plan = replace(
        fused, layers=tuple(replace(layer, format=fmt, route=route) for layer in fused.layers)
    )
    model, _ = files
    apply_to_disk(plan, model, tmp_path / "fused", facts=study.facts)
    apply_to_disk(apart(plan), model, tmp_path / "apart", facts=study.facts)
    written = [
        sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("fused", "apart")
    ]
    assert written[0] == written[1] and "packed.pt" not in written[0]
    with (
        safe_open(tmp_path / "fused" / "model.safetensors", framework="pt") as ours,
        safe_open(tmp_path / "apart" / "model.safetensors", framework="pt") as theirs,
    ):
        assert ours.metadata() == theirs.metadata() and set(ours.keys()) == set(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118 - not a dict
            one, other = ours.get_tensor(name), theirs.get_tensor(name)
            assert one.dtype == other.dtype and torch.equal(one, other), name


def test_a_model_that_is_loaded_is_joined_where_it_is(files, fused, study, tmp_path):
    model, _ = files
    apply_to_disk(fused, model, tmp_path / "out", facts=study.facts)
    mlp = autoquant.load(tmp_path / "out", device="cpu").model.layers[1].mlp
    assert whole_of(mlp.up_proj.weight.data).start == 128


def test_apply_writes_a_fused_plan_and_says_what_it_is(fused_db, run, tmp_path):
    db, plan = fused_db
    result = run("apply", db, "--plan", plan.plan_id, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert f"Plan {plan.plan_id} (fused) applied to 15 layers" in result.stdout
    loaded = autoquant.load(tmp_path / "out")
    assert whole_of(loaded.model.layers[0].self_attn.v_proj.weight.data).start == 96
    assert loaded(IDS).logits.shape[:2] == IDS.shape


@pytest.mark.slow
def test_bench_computes_the_layers_of_a_fused_plan_as_one(fused_db, run, monkeypatch):
    monkeypatch.setattr(CpuBackend, "compile_failure", lambda _backend: None)
    monkeypatch.setattr(parts, "FUNCTIONS", {})
    counts, compile_graph = [], parts.compile_graph

    def count(graph, inputs, **settings):
        counts.append(sum(is_product(node.target) for node in graph.graph.nodes))
        return compile_graph(graph, inputs, **settings)

    monkeypatch.setattr(parts, "compile_graph", count)
    db, plan = fused_db
    result = run("bench", db, "--plan", plan.plan_id, "--json")
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout)[1]
    assert row["plan_id"] == plan.plan_id and row["request_ms"] > 0
    # A block has seven products, of which q, k, v are one then, and so are gate and up.
    assert set(counts) - {0, 1} == {7, 4}, counts


def test_show_says_what_is_computed_as_one(fused_db):
    db, plan = fused_db
    runner = CliRunner()
    text = runner.invoke(app, ["show", str(db), "--plan", plan.plan_id]).stdout
    table = (
        text[text.index("Layers, and why") :].partition("linear layers hold")[0].splitlines()[:-1]
    )
    assert "as one with" in text and all(len(line) <= 80 for line in table)
    layers = json.loads(
        runner.invoke(app, ["show", str(db), "--plan", plan.plan_id, "--json"]).stdout
    )["layers"]
    joined = {
        layer["name"].rpartition(".")[2]: layer["joined"]
        for layer in layers
        if ".0." in layer["name"]
    }
    assert len(joined["q_proj"]) == 3 and len(joined["up_proj"]) == 2 and joined["o_proj"] == []
