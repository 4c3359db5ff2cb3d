"""Layers that read the same input, computed as one: searched, applied, saved, loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import autoquant
from autoquant.applier import apply, apply_to_disk, module_bytes
from autoquant.candidates.flat import flatten_tensor
from autoquant.candidates.joined import whole_of
from autoquant.cli.main import app
from autoquant.models import load_model
from autoquant.profiler.measure import cells_of
from autoquant.store import open_store
from autoquant.tuner.fusion import sibling_sites

from . import quick
from .conftest import rows

IDS = torch.arange(12).unsqueeze(0)


@pytest.fixture(scope="module")
def fused(study):
    """The uniform int8 plan with its siblings joined."""
    plan = next(p for p in study.plans() if p.kind == "uniform" and p.label.endswith("int8-row a16"))
    by_name = {layer.name: layer for layer in plan.layers}
    for names, _ in sibling_sites(study.facts.recording.sites):
        for name in names:
            by_name[name] = replace(by_name[name], route=by_name[names[0]].route, joined=names)
    return replace(plan, layers=tuple(by_name[layer.name] for layer in plan.layers))


def logits(module):
    with torch.no_grad():
        return module(IDS).logits


def test_a_search_that_fuses_times_the_siblings_shapes_too_and_is_a_study_of_its_own(files, tmp_path):
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
    assert new == len(set(cells_of(list(groups.values()))) - set(cells_of(sites))) * len(quick.CANDIDATES)
    proven = study.proofs()
    assert len(proven) >= 3 and not study.store.failed_proofs(study.study_id)
    for plan in study.plans():
        for layer in plan.layers:
            assert layer.joined in {(), *groups}


def test_joined_weights_lie_behind_one_another_and_compute_the_same(files, fused):
    model, _ = files
    alone, together = (load_model(str(model), device="cpu").module for _ in range(2))
    apply(replace(fused, layers=tuple(replace(layer, joined=()) for layer in fused.layers)), alone)
    apply(fused, together)
    assert torch.equal(logits(alone), logits(together)) and module_bytes(alone) == module_bytes(together)
    attention = together.model.layers[0].self_attn
    starts = [whole_of(linear.weight.data).start for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert starts == [0, 64, 96] and whole_of(attention.o_proj.weight.data) is None
    assert set(alone.state_dict()) == set(together.state_dict())


def test_a_saved_model_has_the_original_names_and_is_joined_again_when_it_is_loaded(files, fused, study, tmp_path):
    model, _ = files
    report = apply_to_disk(fused, model, tmp_path / "out", facts=study.facts)
    assert report.logits_identical
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {name for name in names if "k_proj" in name} and not any("+" in name for name in names)
    loaded = autoquant.load(tmp_path / "out")
    mlp = loaded.model.layers[1].mlp
    assert whole_of(mlp.up_proj.weight.data).start == 128
    parts = [flatten_tensor(linear.weight.data)[0][0] for linear in (mlp.gate_proj, mlp.up_proj)]
    assert parts[0].untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()


def test_show_says_what_is_computed_as_one(searched, fused, tmp_path):
    db = shutil.copy(searched.db, tmp_path / "plan.db")
    plan = replace(fused, plan_id="f05ed0000000", label="fused")
    open_store(db).put_plan(plan)
    runner = CliRunner()
    text = runner.invoke(app, ["show", str(db), "--plan", plan.plan_id]).stdout
    table = text[text.index("Layers, and why") :].partition("linear layers hold")[0].splitlines()[:-1]
    assert "as one with" in text and all(len(line) <= 80 for line in table)
    layers = json.loads(runner.invoke(app, ["show", str(db), "--plan", plan.plan_id, "--json"]).stdout)["layers"]
    joined = {layer["name"].rpartition(".")[2]: layer["joined"] for layer in layers if ".0." in layer["name"]}
    assert len(joined["q_proj"]) == 3 and len(joined["up_proj"]) == 2 and joined["o_proj"] == []
