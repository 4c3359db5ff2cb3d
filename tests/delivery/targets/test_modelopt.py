"""A plan as a folder of NVIDIA ModelOpt, which vLLM reads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from autoquant.candidates import get_format
from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.targets import modelopt_folder
from autoquant.delivery.targets.modelopt_folder import decode, encode
from autoquant.engines import TARGETS
from autoquant.errors import CheckpointError, PlanError

ROWS = ("float8-row/plain", "dequantize-matmul")
NVFP4 = ("nvfp4/swizzled", "dequantize-matmul")
MXFP8 = ("mxfp8/swizzled", "dequantize-matmul")
MIXED = {"q_proj": ROWS, "down_proj": NVFP4, "o_proj": MXFP8, "lm_head": ROWS}


def exported(planned, formats, out):
    return export_to_disk(
        planned.plan(formats), planned.folder, out, to="modelopt", facts=planned.facts
    )


@pytest.fixture(scope="module")
def mixed(planned, tmp_path_factory):
    out = tmp_path_factory.mktemp("modelopt") / "out"
    return out, exported(planned, MIXED, out)


@pytest.mark.parametrize("name", ["float8-row/plain", "nvfp4/swizzled", "mxfp8/swizzled"])
def test_what_is_written_decodes_to_the_numbers_of_the_plan(name):
    fmt = get_format(name)
    torch.manual_seed(0)
    weight = fmt.neutral(fmt.store(torch.randn(64, 128, dtype=torch.bfloat16)))
    algorithm = TARGETS["modelopt"].holds[fmt.values]["a16"].name
    parts = encode(weight, algorithm)
    assert torch.equal(decode(parts, algorithm).dequantize(), weight.dequantize())


def test_tensors_have_the_names_types_and_shapes_that_vllm_makes(mixed):
    """Those of `create_weights` of its ModelOpt schemes."""
    stored = load_file(mixed[0] / "model.safetensors")
    shapes = {
        name: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in stored.items()
        if ".layers.0." in name and "norm" not in name
    }
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert shapes[f"{attention}.q_proj.weight"] == (torch.float8_e4m3fn, (64, 64))
    assert shapes[f"{attention}.q_proj.weight_scale"] == (torch.float32, (64,))
    assert shapes[f"{attention}.o_proj.weight"] == (torch.float8_e4m3fn, (64, 64))
    assert shapes[f"{attention}.o_proj.weight_scale"] == (torch.uint8, (64, 2))
    assert shapes[f"{mlp}.down_proj.weight"] == (torch.uint8, (64, 64))
    assert shapes[f"{mlp}.down_proj.weight_scale"] == (torch.float8_e4m3fn, (64, 8))
    assert shapes[f"{mlp}.down_proj.weight_scale_2"] == (torch.float32, ())


def test_both_files_name_every_layer_with_its_algorithm(mixed):
    out, report = mixed
    quantization = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    settings = json.loads((out / "config.json").read_text())
    config = settings["quantization_config"]
    assert config["quant_method"] == "modelopt" and config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"] == quantization["quantized_layers"]
    layers = quantization["quantized_layers"]
    assert layers["model.layers.1.mlp.down_proj"] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert layers["lm_head"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    assert "model.layers.0.mlp.up_proj" in quantization["exclude_modules"]
    assert settings["tie_word_embeddings"] is False
    assert any("vllm cannot load it" in note for note in report.notes)  # q, k, v differ


def test_a_name_within_that_of_a_quantized_layer_is_not_excluded():
    excluded = modelopt_folder._excluded(("mlp.gate", "mlp.up_proj"), {"mlp.gate_proj": {}})
    assert excluded == ["mlp.up_proj"]


def test_integers_are_refused_with_what_is_read(planned, tmp_path):
    with pytest.raises(PlanError, match=r"reads no integers of ModelOpt; nearest: float8-row\."):
        exported(planned, {"o_proj": ("int8-row/plain", "int-mm")}, tmp_path / "out")


def test_it_says_that_modelopt_is_not_installed_or_what_it_reads(mixed):
    _, report = mixed
    if report.likeness is None:
        assert "pip install nvidia-modelopt" in report.unread
    else:
        assert (report.likeness.weights, report.likeness.moved) == (7, 0)


def test_other_numbers_than_the_plan_has_are_an_error(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(
        modelopt_folder,
        "encode",
        lambda weight, name: encode(replace(weight, scale=weight.scale * 2), name),
    )
    with pytest.raises(CheckpointError, match="q_proj as FP8_PER_CHANNEL_PER_TOKEN has other"):
        exported(planned, {"q_proj": ROWS}, tmp_path / "out")
    assert not list(tmp_path.iterdir())
