"""A plan as a folder of torchao's tensors, which transformers reads without autoquant."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from autoquant.candidates import get_format
from autoquant.delivery import shards
from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.targets import torchao_folder
from autoquant.delivery.targets.base import ExportedLayer
from autoquant.delivery.targets.torchao_folder import torchao_config, torchao_tensor
from autoquant.engines import TARGETS, Values
from autoquant.errors import CheckpointError
from autoquant.records import LinearShape

INT8 = ("int8-row/plain", "dequantize-matmul")
ROUNDED = ("int8-row/plain", "dequantize-matmul", "int-mm")
MIXED = {
    "o_proj": INT8,
    "gate_proj": ("int3-g32/bit-planes", "dequantize-matmul"),
    "up_proj": ("int3-g32/bit-planes", "dequantize-matmul"),
    "down_proj": ("int2-g32/bit-planes", "dequantize-matmul"),
    "q_proj": ("float8-row/plain", "dequantize-matmul"),
    "k_proj": ("float8-tensor/plain", "dequantize-matmul"),
    "v_proj": ("int4s-g32/lanes", "unpack-matmul"),
    "lm_head": INT8,
}


def exported(planned, formats, out):
    return export_to_disk(
        planned.plan(formats), planned.folder, out, to="transformers", facts=planned.facts
    )


def configs(folder):
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "torchao"
    return settings["quant_type"]["default"]["_data"]["fqn_to_config"]


@pytest.fixture(scope="module")
def mixed(planned, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "out"
    return out, exported(planned, MIXED, out)


def test_the_reader_has_the_numbers_of_the_plan(mixed):
    _, report = mixed
    assert report.reader.startswith("transformers ") and "torchao" in report.reader
    assert (report.likeness.weights, report.likeness.moved) == (15, 0)
    assert report.likeness.loss < 2 * report.likeness.plan_loss


def test_a_model_in_several_files_is_read_as_well(untied, monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    report = exported(untied, MIXED, tmp_path / "out")
    assert sum(name.endswith(".safetensors") for name in report.files) > 2
    assert (report.likeness.weights, report.likeness.moved) == (15, 0)


def test_rounded_activations_are_attributes_of_the_tensors(planned, tmp_path):
    report = exported(planned, {"proj": ROUNDED}, tmp_path / "out")
    assert report.likeness.moved == 0 and report.likeness.loss < 2 * report.likeness.plan_loss
    kinds = {value["_type"] for value in configs(tmp_path / "out").values()}
    assert kinds == {"Int8DynamicActivationInt8WeightConfig"}


def test_layers_that_vllm_computes_as_one_are_named_as_one_if_they_are_alike(mixed):
    found = configs(mixed[0])
    assert found["model.layers.1.mlp.gate_up_proj"] == found["model.layers.1.mlp.up_proj"]
    assert "model.layers.1.self_attn.qkv_proj" not in found


def test_a_quantized_head_is_untied(mixed):
    assert json.loads((mixed[0] / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head" in configs(mixed[0])


def test_other_numbers_than_the_plan_has_are_an_error(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(
        torchao_folder,
        "torchao_tensor",
        lambda layer, weight, dtype: torchao_tensor(
            layer, replace(weight, scale=weight.scale * 2), dtype
        ),
    )
    with pytest.raises(CheckpointError, match="o_proj as Int8Tensor has other numbers"):
        exported(planned, {"o_proj": INT8}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def layer(name, activation="a16"):
    values = Values.parse(name)
    shape = LinearShape(n=64, k=128, bias=False, dtype="bfloat16")
    scheme = TARGETS["transformers"].scheme(str(values), activation, shape)
    return ExportedLayer("layer", values, scheme, None)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("int8-row/plain", "a16"),
        ("int8-row/plain", "a8-row"),
        ("float8-row/plain", "a16"),
        ("float8-tensor/plain", "a16"),
        ("int4s-g64/lanes", "a16"),
        ("int3-g64/bit-planes", "a16"),
        ("int2-g32/bit-planes", "a16"),
    ],
)
def test_a_tensor_has_every_attribute_that_its_configuration_gives(name, activation):
    """vLLM makes a tensor by the configuration, and copies ours into it part by part."""
    fmt, made = get_format(name), layer(name, activation)
    linear = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    ours = torchao_tensor(made, fmt.neutral(fmt.store(linear.weight.data)), torch.bfloat16)
    numbers = ours.dequantize()
    quantize_(linear, torchao_config(made))
    theirs = linear.weight.data
    assert type(ours) is type(theirs)
    (names, context), (other_names, other_context) = (
        each.__tensor_flatten__() for each in (ours, theirs)
    )
    assert (names, str(context)) == (other_names, str(other_context))
    for part in names:
        assert getattr(ours, part).dtype == getattr(theirs, part).dtype, part
    theirs.narrow(0, 32, 32).copy_(ours.narrow(0, 32, 32))
    assert torch.equal(theirs.dequantize()[32:], numbers[32:])
