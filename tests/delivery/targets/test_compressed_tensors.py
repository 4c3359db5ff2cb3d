"""A plan as a folder in the form of compressed-tensors, held against the package of that name."""

from __future__ import annotations

import json

import pytest
import torch

from autoquant.candidates import get_format
from autoquant.delivery import shards
from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.targets import compressed_tensors
from autoquant.delivery.targets.base import ExportedLayer
from autoquant.delivery.targets.compressed_tensors import (
    WRITER,
    Group,
    decode,
    encode,
    pack_bits,
    quantization_config,
    unpack_bits,
)
from autoquant.engines import TARGETS, Values
from autoquant.engines.targets import COMPRESSED_TENSORS
from autoquant.errors import CheckpointError, PlanError
from autoquant.models import weights
from autoquant.records import LinearShape

INT8 = ("int8-row/plain", "dequantize-matmul")
ROUNDED = ("int8-row/plain", "dequantize-matmul", "int-mm")
INT3 = ("int3-g32/bit-planes", "dequantize-matmul")
INT4 = ("int4s-g32/lanes", "unpack-matmul")
INT2 = ("int2-g32/bit-planes", "dequantize-matmul")
FLOAT8_ROW = ("float8-row/plain", "dequantize-matmul")
FLOAT8 = ("float8-tensor/plain", "dequantize-matmul")
MIXED = {
    "o_proj": INT8,
    "gate_proj": INT3,
    "up_proj": INT3,
    "down_proj": INT2,
    "k_proj": INT4,
    "lm_head": INT8,
}
FORMATS = ["int8-row/plain", "float8-row/plain", "float8-tensor/plain", "int4s-g64/lanes",
           "int4s-g64/tiled", "int3-g64/bit-planes", "int2-g32/bit-planes", "mxfp8/swizzled",
           "mxfp4/swizzled", "nvfp4/swizzled"]  # fmt: skip


def exported(planned, formats, out):
    return export_to_disk(
        planned.plan(formats), planned.folder, out, to="compressed-tensors", facts=planned.facts
    )


def settings(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def mixed(planned, tmp_path_factory):
    """A folder and its report, of a plan with several schemes and unquantized layers."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    return out, exported(planned, MIXED, out)


def test_the_reader_has_the_numbers_and_logits_of_the_plan(mixed):
    pytest.importorskip("compressed_tensors")
    _, report = mixed
    assert "compressed-tensors" in report.reader and report.unread == ""
    assert (report.likeness.weights, report.likeness.moved) == (11, 0)
    assert report.likeness.same_logits and report.likeness.loss < 2 * report.likeness.plan_loss


def test_layers_of_one_scheme_are_one_group_under_their_full_names(mixed):
    out, report = mixed
    config = settings(out)["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    groups = {tuple(group["targets"]): group for group in config["config_groups"].values()}
    int8 = groups["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "lm_head"]
    assert int8["format"] == "pack-quantized" and int8["input_activations"] is None
    assert int8["weights"]["strategy"] == "channel"
    assert len(groups) == 4
    assert report.schemes["int3-g32 as pack-quantized"] == 4


def test_every_unquantized_linear_is_named_and_embeddings_are_not(mixed):
    ignored = settings(mixed[0])["quantization_config"]["ignore"]
    assert ignored == [
        f"model.layers.{block}.self_attn.{leaf}"
        for block in (0, 1)
        for leaf in ("q_proj", "v_proj")
    ]


def test_a_quantized_head_is_untied_and_its_embedding_stays(mixed):
    out, _ = mixed
    assert settings(out)["tie_word_embeddings"] is False
    names = weights.names(weights.files(out))
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= set(names)


def test_a_head_that_is_left_alone_stays_tied(planned, tmp_path):
    exported(planned, {"o_proj": INT8}, tmp_path / "out")
    assert settings(tmp_path / "out")["tie_word_embeddings"] is True
    names = weights.names(weights.files(tmp_path / "out"))
    assert not [name for name in names if name.startswith("lm_head")]
    assert not [name for name in names if "inv_freq" in name]  # no state dict has it


def test_nothing_in_the_folder_needs_autoquant(mixed):
    out, _ = mixed
    assert "autoquant" not in (out / "config.json").read_text()
    assert (out / "tokenizer.json").is_file() and (out / "generation_config.json").is_file()


def test_a_route_that_rounds_in_part_is_exported_as_rounded(planned, tmp_path):
    report = exported(planned, {"proj": ROUNDED, "head": INT3}, tmp_path / "out")
    config = settings(tmp_path / "out")["quantization_config"]
    assert config["format"] == "mixed-precision"
    group, head = config["config_groups"].values()
    assert (group["format"], head["format"]) == ("int-quantized", "pack-quantized")
    assert group["input_activations"]["strategy"] == "token"
    assert (
        "14 layers round the activation as a16 and a8-row in the plan, and as a8-row here (--activations a16 does not round it)"
        in (report.notes)
    )
    if report.likeness is not None:
        assert report.likeness.moved == 0 and not report.likeness.same_logits
        assert report.likeness.loss < 2 * report.likeness.plan_loss


def test_one_scale_of_a_tensor_is_written_for_each_row(planned, tmp_path):
    formats = {"down_proj": FLOAT8_ROW, "o_proj": FLOAT8}
    report = exported(planned, formats, tmp_path / "out")
    (group,) = settings(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert group["weights"]["strategy"] == "channel" and len(group["targets"]) == 4
    assert report.likeness is None or report.likeness.moved == 0


def test_layers_that_an_engine_computes_as_one_need_one_scheme(planned, tmp_path):
    report = exported(
        planned, {"q_proj": INT8, "gate_proj": INT8, "up_proj": INT8}, tmp_path / "out"
    )
    told = next(note for note in report.notes if note.startswith("sglang cannot load it"))
    assert "q_proj, k_proj, v_proj as one, and 2 of 4 such groups have several schemes" in told


def test_what_vllm_cannot_compute_on_a_cpu_is_said(mixed):
    told = [note for note in mixed[1].notes if note.startswith("vllm cannot compute 3 layers")]
    assert told and "on CPUs; nearest: int8-row+a8-row" in told[0]


def test_all_that_cannot_be_held_is_refused_at_once_and_nothing_is_written(planned, tmp_path):
    formats = {
        "o_proj": ("int4-g32/lanes", "unpack-matmul"),
        "up_proj": ("int4-g64/lanes", "unpack-matmul"),
        "down_proj": INT8,
    }
    with pytest.raises(PlanError) as refused:
        exported(planned, formats, tmp_path / "out")
    assert "2 layers have int4-g32 (model.layers.0.self_attn.o_proj and 1 more)" in str(
        refused.value
    )
    assert "2 layers have int4-g64" in str(refused.value)
    assert "nearest: int4s-g64" in str(refused.value) and "--for vllm" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_plan_that_quantizes_nothing_is_refused(planned, tmp_path):
    with pytest.raises(PlanError, match="plan abcd quantizes nothing: serve the model itself"):
        exported(planned, {}, tmp_path / "out")


def test_a_model_that_is_not_of_transformers_is_refused(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(compressed_tensors.CompressedTensorsWriter, "write", None)
    monkeypatch.setattr("autoquant.delivery.targets.huggingface.source_folder", lambda _: None)
    with pytest.raises(PlanError, match=r"language models of transformers.*autoquant apply"):
        exported(planned, {"o_proj": INT8}, tmp_path / "out")


def test_files_that_name_weights_otherwise_are_refused(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "names", lambda _: ["transformer.wte.weight"])
    with pytest.raises(PlanError, match=r"names its weights otherwise"):
        exported(planned, {"o_proj": INT8}, tmp_path / "out")


def test_a_large_model_lies_in_several_files(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    report = exported(planned, MIXED, tmp_path / "out")
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and files < set(report.files)
    assert report.likeness is None or report.likeness.same_logits


def test_without_the_reader_it_says_how_to_install_it(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(type(WRITER), "missing", lambda _: ["compressed-tensors"])
    report = exported(planned, MIXED, tmp_path / "out")
    assert report.likeness is None
    assert report.unread == "compressed-tensors is not installed: pip install compressed-tensors"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_other_numbers_than_the_plan_has_are_an_error(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(
        compressed_tensors, "pack_bits", lambda codes, bits: pack_bits(codes ^ 1, bits)
    )
    with pytest.raises(CheckpointError, match=r"o_proj as pack-quantized has other numbers"):
        exported(planned, {"o_proj": INT8}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_reader_that_makes_other_numbers_is_an_error(planned, monkeypatch, tmp_path):
    pytest.importorskip("compressed_tensors")

    def wrong(weight, scheme):
        parts = encode(weight, scheme)
        return parts | {"_scale": parts["_scale"] * 2}

    monkeypatch.setattr(compressed_tensors, "encode", wrong)
    monkeypatch.setattr(compressed_tensors, "_same", lambda *_: True)
    with pytest.raises(CheckpointError, match="makes other weights of what was written"):
        exported(planned, {"o_proj": INT8}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def weight():
    made = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    made[3] = 0
    return made.to(torch.bfloat16)


def layer(name, weight):
    values = Values.parse(name)
    shape = LinearShape(n=weight.shape[0], k=weight.shape[1], bias=False, dtype="bfloat16")
    scheme = TARGETS["compressed-tensors"].scheme(str(values), "a16", shape)
    return ExportedLayer("layer", values, scheme, None)


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_undoes_encoding(name, weight):
    fmt = get_format(name)
    numbers = fmt.neutral(fmt.store(weight))
    again = decode(encode(numbers, layer(name, weight).scheme), numbers.bits, numbers.group)
    torch.testing.assert_close(
        again.dequantize(), numbers.dequantize(), atol=0, rtol=1e-6 if name.startswith("nv") else 0
    )


@pytest.mark.parametrize("name", FORMATS)
def test_the_package_decompresses_the_same_numbers(name, weight):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    fmt = get_format(name)
    numbers = fmt.neutral(fmt.store(weight))
    made = layer(name, weight)
    group = Group.of(made, numbers)
    group.targets.append("layer")
    config = QuantizationConfig.model_validate(quantization_config([group], []))
    scheme = next(iter(config.config_groups.values()))
    parts = {f"weight{key}": part for key, part in encode(numbers, made.scheme).items()}
    decompressed = BaseCompressor.get_value_from_registry(made.scheme.name).decompress(
        parts, scheme
    )
    found = decompressed["weight"].to(torch.bfloat16)
    assert torch.equal(found, numbers.dequantize().to(torch.bfloat16))


@pytest.mark.parametrize(
    ("family", "activation"),
    [(family, each) for family, schemes in COMPRESSED_TENSORS.holds.items() for each in schemes],
)
def test_the_package_takes_every_scheme_of_the_table(family, activation):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    exported_as = COMPRESSED_TENSORS.holds[family][activation]
    group = Group(
        exported_as.name,
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        exported_as.activation,
        ["layer"],
    )
    read = QuantizationConfig.model_validate(quantization_config([group], ["lm_head"]))
    scheme = read.config_groups["group_0"]
    assert scheme.format == read.format == exported_as.name
    assert (scheme.input_activations is None) == (exported_as.activation == "a16")
    assert scheme.input_activations is None or scheme.input_activations.dynamic


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [32, 72, 84])
def test_bits_are_packed_as_the_package_packs_them(bits, k):
    codes = torch.randint(0, 2**bits, (5, k), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes.to(torch.uint8), bits)
    assert packed.dtype == torch.int32 and packed.shape == (5, -(-k * bits // 32))
    assert torch.equal(unpack_bits(packed, bits, k), codes.to(torch.uint8))
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packed, helpers.pack_to_int32(signed, bits))
