"""GPT-2's linears, whose weights are the other way round: searched, applied, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from models.test_model_streaming import WORKLOAD
from models.tiny_models import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import autoquant
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery import checkpoint
from autoquant.delivery.applier import applied, check_fits
from autoquant.delivery.held import check_linears
from autoquant.delivery.on_disk import apply_to_disk
from autoquant.devices.memory import LIMIT_VARIABLE
from autoquant.errors import CheckpointError, ModelError, PlanError
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.models.load import from_module
from autoquant.models.shown import show_linears
from autoquant.models.turned import turned_names
from autoquant.profiler.record import record_model
from delivery.test_layers import plan_for

IDS = torch.arange(3, 15).unsqueeze(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=512, n_positions=64, initializer_range=0.2
    )
    out = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).bfloat16().save_pretrained(out)
    tiny_tokenizer().save_pretrained(out)
    return out


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").eval()


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_all_linears_are_found_and_compute_what_they_did(folder):
    loaded = load_model(folder)
    recording = record_model(loaded, WORKLOAD, ignore)
    assert recording.weights_share > 0.9 and len(recording.sites) == 9
    assert {site.shape.bias for site in recording.sites} == {True, False}
    assert torch.allclose(logits(loaded.module), logits(plain(folder)), rtol=0.05, atol=0.05)


def test_a_module_of_the_users_stays_as_it_is(folder):
    model = plain(folder)
    loaded = from_module(model)
    assert len(turned_names(loaded.module)) == 8 and turned_names(model) == []
    assert loaded.content_hash == from_module(plain(folder)).content_hash


def test_what_is_saved_loads_again_with_and_without_autoquant_load(folder, tmp_path):
    loaded = load_model(folder)
    plan = plan_for(loaded)
    module = applied(plan, loaded.module, None)
    expected = logits(module)
    assert not torch.equal(expected, logits(loaded.module))
    again = tmp_path / "again"
    again.mkdir()
    checkpoint.write(replace(loaded, module=module), plan, again)
    ours, theirs = autoquant.load(again), AutoModelForCausalLM.from_pretrained(again)
    for model in (ours, theirs):
        assert torch.equal(logits(model), expected)
        assert isinstance(model.transformer.h[0].attn.c_attn.weight.data, RoutedWeight)
    theirs.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(autoquant.load(tmp_path / "saved")), expected)


def test_a_folder_is_read_back_as_it_will_run_though_the_model_has_dropout(folder, tmp_path):
    loaded = load_model(folder)
    plan = plan_for(loaded)
    facts = SimpleNamespace(
        source=asdict(loaded.source), device=SimpleNamespace(type="cpu"), calibration=None
    )
    assert any(isinstance(part, nn.Dropout) and part.p > 0 for part in loaded.module.modules())
    report = apply_to_disk(plan, folder, tmp_path / "out", facts=facts)
    assert report.compared == "logits"


def test_a_plan_is_applied_to_a_model_of_the_users(folder):
    plan = plan_for(load_model(folder))
    expected = logits(applied(plan, load_model(folder).module, None))
    model = autoquant.apply(plan, plain(folder), listener=ignore)
    assert torch.equal(logits(model), expected)


def test_a_layer_that_no_plan_names_stays_a_conv1d(folder):
    model = plain(folder)
    show_linears(model, {"transformer.h.0.attn.c_attn"})
    assert turned_names(model) == ["transformer.h.0.attn.c_attn"]
    assert isinstance(model.transformer.h[1].attn.c_attn, Conv1D)


def test_another_shape_is_refused_before_anything_is_changed(folder):
    plan = plan_for(load_model(folder))
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, n_positions=64)
    other = GPT2LMHeadModel(config).bfloat16()
    with pytest.raises(ModelError, match=r"the plan is for another model: .* is \(192, 64\) here"):
        autoquant.apply(plan, other)
    assert turned_names(other) == []


def test_a_model_without_room_is_refused(folder, monkeypatch):
    plan = plan_for(load_model(folder))
    monkeypatch.setenv(LIMIT_VARIABLE, "300000")
    streamed = load_model(folder)
    assert streamed.stream is not None
    with pytest.raises(ModelError, match="other way round in the model's files"):
        check_fits(plan, streamed.module)


def test_files_for_engines_are_refused(folder):
    with pytest.raises(PlanError, match=r"GPT2LMHeadModel have transformer.h.0.attn.c_attn"):
        check_linears(load_model(folder).module, [])


@pytest.mark.parametrize("turned", [[], ["transformer.wte"], ["nothing"], ["transformer"]])
def test_a_manifest_cannot_turn_anything_else(folder, tmp_path, turned):
    loaded = load_model(folder)
    plan = plan_for(loaded)
    checkpoint.write(replace(loaded, module=applied(plan, loaded.module, None)), plan, tmp_path)
    path = tmp_path / "autoquant.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"turned": turned}))
    with pytest.raises(CheckpointError, match="another architecture"):
        autoquant.load(tmp_path)


def test_a_shared_linear_is_turned_once():
    shared = Conv1D(4, 8)
    module = nn.ModuleDict({"a": shared, "b": shared})
    x = torch.randn(3, 8)
    expected = shared(x)
    show_linears(module)
    assert module["a"] is module["b"] and torch.allclose(module["b"](x), expected, atol=1e-6)
