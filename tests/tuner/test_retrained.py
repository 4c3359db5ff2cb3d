"""A plan applied to weights that were trained on after the search."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from delivery.targets.conftest import Planned, save_llama

import autoquant
from autoquant.delivery.on_disk import apply_to_disk
from autoquant.errors import ModelError
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.solver.limits import Limits
from autoquant.tuner.judge import Asked, make_judge
from autoquant.tuner.retrained import apply_retrained


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    planned = Planned(save_llama(tmp_path_factory.mktemp("model"), tied=True))
    loaded = load_model(planned.folder, device="cpu")
    quality = make_judge(Asked.of(None, None, None), loaded, [], 0, ignore).quality
    identity = {"candidates": [], "seed": 0, "quality": quality.key}
    facts = SimpleNamespace(
        **vars(planned.facts), identity=identity, limits=Limits(max_ppl_increase=-0.5).as_object()
    )
    study = SimpleNamespace(
        facts=facts,
        limits=Limits(max_ppl_increase=-0.5),
        study_id="s",
        store=SimpleNamespace(references=lambda _: {}),
    )
    plan = planned.plan({"proj": ("int4-g32/lanes", "unpack-matmul")})
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter.mul_(1.1)
    trained = tmp_path_factory.mktemp("trained")
    loaded.module.save_pretrained(trained)
    loaded.tokenizer.save_pretrained(trained)
    return study, plan, trained


def test_other_weights_are_refused_unless_they_are_said_to_be_trained_on(searched, tmp_path):
    study, plan, trained = searched
    with pytest.raises(ModelError, match=r"not the model that was searched.*--retrained"):
        apply_to_disk(plan, trained, tmp_path / "out", facts=study.facts)


def test_the_plan_rounds_the_trained_weights_and_quality_is_measured_there(searched, tmp_path):
    study, plan, trained = searched
    report = apply_retrained(study, plan, trained, tmp_path / "out")
    assert report.applied.model_hash != plan.model_hash and report.applied.compared == "logits"
    assert "unquantized" in report.quality[0] and "is beyond -50 %" in report.beyond
    weight = load_model(trained, device="cpu").module.model.layers[0].mlp.up_proj.weight
    made = autoquant.load(tmp_path / "out").model.layers[0].mlp.up_proj.weight.dequantize()
    assert (made - weight.float()).norm() < 0.2 * weight.float().norm()


def test_a_model_with_other_layers_is_refused(searched, tmp_path):
    study, plan, _ = searched
    other = save_llama(tmp_path / "other", tied=True)
    model = load_model(other, device="cpu").module
    model.config.intermediate_size = 96
    type(model)(model.config).to(torch.bfloat16).save_pretrained(other)
    with pytest.raises(ModelError, match="the plan is for another model"):
        apply_retrained(study, plan, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
