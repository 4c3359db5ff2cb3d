"""Quantization-aware training of a plan: what is described, what is trained, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import autoquant
from autoquant.candidates import get_format
from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.targets.base import ExportedLayer
from autoquant.delivery.targets.qat_folder import described
from autoquant.engines import TARGETS, Values
from autoquant.errors import CheckpointError, ModelError, PlanError
from autoquant.models import load_model
from autoquant.records import LinearShape

FORMATS = {
    "q_proj": ("int8-row/plain", "int-mm"),
    "k_proj": ("int4-g32/lanes", "unpack-matmul"),
    "v_proj": ("int4s-g32/lanes", "unpack-matmul"),
    "up_proj": ("int3-g32/bit-planes", "dequantize-matmul"),
    "gate_proj": ("float8-row/plain", "dequantize-matmul"),
    "lm_head": ("int8-row/plain", "dequantize-matmul"),
}


@pytest.fixture(scope="module")
def made(planned, tmp_path_factory):
    out = tmp_path_factory.mktemp("qat") / "out"
    plan = planned.plan(FORMATS)
    return out, export_to_disk(plan, planned.folder, out, to="qat", facts=planned.facts)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    from delivery.targets.conftest import Planned, save_llama

    return Planned(save_llama(tmp_path_factory.mktemp("model"), tied=True))


def test_every_layer_is_described_and_rounded_as_the_plan_does(made):
    out, report = made
    layers = json.loads((out / "qat.json").read_text())["layers"]
    assert len(layers) == 11 and report.files == ("qat.json",)
    first = "model.layers.0.self_attn"
    assert layers[f"{first}.k_proj"] == {
        "weight": {"type": "int4", "per": 32, "symmetric": False},
        "activation": None,
    }
    assert layers[f"{first}.q_proj"]["activation"] == {
        "type": "int8",
        "per": "token",
        "symmetric": False,
    }
    assert report.likeness.loss < 3 * report.likeness.plan_loss
    assert report.likeness.loss > 0 and not report.likeness.same_logits


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("int8-row/plain", "a16"),
        ("int8-row/plain", "a8-row"),
        ("int4-g32/lanes", "a16"),
        ("int4s-g64/lanes", "a16"),
        ("int3-g32/bit-planes", "a16"),
        ("int2-g32/bit-planes", "a16"),
        ("float8-row/plain", "a16"),
        ("float8-tensor/plain", "a16"),
    ],
)
def test_the_weight_in_training_is_near_that_of_the_plan(name, activation, tmp_path):
    shape = LinearShape(n=64, k=128, bias=False, dtype="bfloat16")
    values, fmt = Values.parse(name), get_format(name)
    scheme = TARGETS["qat"].scheme(str(values), activation, shape)
    layer = described(ExportedLayer("0", values, scheme, None))
    (tmp_path / "qat.json").write_text(json.dumps({"format_version": 1, "layers": {"0": layer}}))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    weight = model[0].weight.detach().clone()
    numbers = fmt.dequantize(fmt.store(weight.bfloat16()))
    planned_error = (numbers - weight).norm()
    autoquant.prepare_qat(model, tmp_path)
    trained = model[0].weight_fake_quantizer(model[0].weight)
    assert 0 < (trained - weight).norm() < 1.2 * planned_error
    assert (trained - numbers).norm() < 1.3 * planned_error
    model(torch.randn(3, 128)).sum().backward()
    assert model[0].weight.grad.norm() > 0
    autoquant.finish_qat(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, weight)


def test_a_tied_head_stays_tied_in_training(made, planned):
    model = load_model(planned.folder, device="cpu").module
    autoquant.prepare_qat(model, made[0])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    autoquant.finish_qat(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_model_is_refused_and_left_as_it_is(made):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"no linear .*q_proj.* and 8 more"):
        autoquant.prepare_qat(model, made[0])
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no qat.json"),
        ("{", "damaged"),
        ('{"format_version": 2, "layers": {}}', "format_version"),
        (
            '{"format_version": 1, "layers": {"a": {"weight": {"type": "int5"}, "activation": null}}}',
            "int5",
        ),
    ],
)
def test_a_damaged_description_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "qat.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        autoquant.prepare_qat(nn.Sequential(nn.Linear(4, 4)), tmp_path)


def test_what_torchao_cannot_train_is_refused(planned, tmp_path):
    plan = planned.plan({"o_proj": ("mxfp4/swizzled", "dequantize-matmul")})
    with pytest.raises(PlanError, match="torchao trains no mxfp4; nearest: int4s-g32"):
        export_to_disk(plan, planned.folder, tmp_path / "out", to="qat", facts=planned.facts)
