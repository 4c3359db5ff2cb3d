"""Export to GGUF: blocks, the user's own file as the base, and what readers make of it."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from autoquant.candidates import InputStatistics, get_format
from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.targets import gguf_writer
from autoquant.delivery.targets.base import ExportedLayer
from autoquant.delivery.targets.gguf_blocks import blocks
from autoquant.delivery.targets.gguf_file import GgufFile
from autoquant.engines import Scheme, Values
from autoquant.errors import CheckpointError, PlanError
from autoquant.models import load_model

from .conftest import Planned

gguf = pytest.importorskip("gguf")

INT8 = ("int8-row/plain", "dequantize-matmul")
INT4 = ("int4-g32/lanes", "unpack-matmul")
INT4S = ("int4s-g32/lanes", "unpack-matmul")
INT3 = ("int3-g32/bit-planes", "dequantize-matmul")
MIXED = {
    "q_proj": INT8,
    "k_proj": INT4S,
    "v_proj": INT3,
    "o_proj": INT4,
    "down_proj": ("mxfp4/swizzled", "dequantize-matmul"),
    "up_proj": ("nvfp4/swizzled", "dequantize-matmul"),
}


def converted(folder, path, *, kind="BF16", tied=True, parts=1, change=lambda name, tensor: tensor):
    """Write the GGUF that llama.cpp's converter makes of a Llama, without a tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    if parts > 1:
        writer.add_uint16("split.count", parts)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list(["one", "two", "three"])
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if found := re.search(r"([qk])_proj", name):
            halves = tensor.reshape(heads[found[1]], 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        numbers = change(name, tensor).float().numpy()
        own = gguf.GGMLQuantizationType["F32" if numbers.ndim == 1 else kind]
        there = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(there, gguf.quants.quantize(numbers, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def base(planned, tmp_path_factory):
    return converted(planned.folder, tmp_path_factory.mktemp("base") / "model-bf16.gguf")


def exported(planned, formats, out, base):
    plan = planned.plan(formats)
    return export_to_disk(plan, planned.folder, out, to="gguf", facts=planned.facts, base=base)


def tensors(path):
    return {each.name: each for each in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("format_id", "scheme"),
    [
        ("int8-row/plain", "Q8_0"),
        ("int4s-g32/lanes", "Q4_0"),
        ("int4s-g128/lanes", "Q4_0"),
        ("int4s-g64-gptq/lanes", "Q4_0"),
        ("int3-g64/bit-planes", "Q4_0"),
        ("int2-g32/bit-planes", "Q4_0"),
        ("int4-g64/lanes", "Q4_1"),
        ("int5s-g32/bit-planes", "Q5_0"),
        ("int5s-g32-gptq/bit-planes", "Q5_0"),
        ("int5-g32/bit-planes", "Q5_1"),
        ("int5-g32-gptq/bit-planes", "Q5_1"),
        ("int5-g32-hqq/bit-planes", "Q5_1"),
        ("int6s-g16/super-blocks", "Q6_K"),
        ("mxfp4/swizzled", "MXFP4"),
        ("nvfp4/swizzled", "NVFP4"),
    ],
)
def test_blocks_hold_the_numbers_of_the_format_exactly(format_id, scheme):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(48, 256, generator=generator) for _ in range(2))
    fmt = get_format(format_id)
    neutral = fmt.neutral(fmt.store((weight / 20).bfloat16(), InputStatistics(x.t() @ x)))
    kind = gguf.GGMLQuantizationType[scheme]
    found = torch.from_numpy(gguf.quants.dequantize(blocks(neutral, scheme).numpy(), kind))
    if neutral.tensor_scale is not None:
        found = found * neutral.tensor_scale
    assert torch.equal(found, neutral.dequantize())


def test_a_mixed_plan_is_read_back_with_its_own_numbers(planned, base, tmp_path):
    report = exported(planned, MIXED, tmp_path / "out", base)
    assert report.files == ("model.gguf", "tensor-types.txt")
    assert report.likeness.weights == 12 and report.likeness.moved == 0
    assert report.likeness.same_logits
    assert report.reader.startswith("gguf 0.")
    types = {
        name: each.tensor_type.name for name, each in tensors(report.out / "model.gguf").items()
    }
    assert types["blk.0.attn_q.weight"] == "Q8_0" and types["blk.1.attn_k.weight"] == "Q4_0"
    assert types["blk.0.attn_output.weight"] == "Q4_1" and types["blk.0.ffn_gate.weight"] == "BF16"
    assert types["blk.0.ffn_down.weight"] == "MXFP4" and types["blk.0.ffn_up.weight"] == "NVFP4"
    assert types["blk.0.ffn_up.scale"] == "F32" and types["output_norm.weight"] == "F32"


def test_transformers_reads_the_same_numbers(planned, base, tmp_path):
    pytest.importorskip("accelerate")
    formats = {end: MIXED[end] for end in ("q_proj", "k_proj", "v_proj", "o_proj")}
    report = exported(planned, formats, tmp_path / "out", base)
    found = AutoModelForCausalLM.from_pretrained(
        report.out, gguf_file="model.gguf", dtype=torch.float32
    )
    original = load_model(planned.folder).module
    for layer in planned.plan(formats).layers:
        name = layer.parameters[0]
        weight = original.get_parameter(name).data
        if layer.format != "bfloat16/plain":
            fmt = get_format(layer.format)
            weight = fmt.dequantize(fmt.store(weight))
        assert torch.equal(found.get_parameter(name).data, weight.float()), name


def test_a_quantized_head_stands_beside_the_embedding_it_was_tied_to(planned, base, tmp_path):
    report = exported(planned, {"lm_head": INT8}, tmp_path / "out", base)
    found = tensors(report.out / "model.gguf")
    assert found["output.weight"].tensor_type.name == "Q8_0"
    assert found["token_embd.weight"].tensor_type.name == "BF16"
    assert report.likeness.same_logits
    assert "cannot quantize the head" in report.notes[0]
    assert "--embedding head" in report.notes[1]
    assert "output" not in (report.out / "tensor-types.txt").read_text().split()


def test_layers_that_the_plan_leaves_unquantized_in_another_layout_are_the_bases(
    planned, base, tmp_path
):
    routed = ("bfloat16/routed", "cpu-rows", "matmul")
    formats = {"q_proj": INT8, "k_proj": routed, "lm_head": routed}
    report = exported(planned, formats, tmp_path / "out", base)
    assert report.likeness.weights == 2 and report.likeness.same_logits
    assert "output.weight" not in tensors(report.out / "model.gguf")


def test_settings_and_what_is_left_alone_are_those_of_the_base(planned, base, tmp_path):
    report = exported(planned, {"q_proj": INT8}, tmp_path / "out", base)
    before, after = gguf.GGUFReader(base), gguf.GGUFReader(report.out / "model.gguf")
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            assert after.get_field(name).contents() == field.contents(), name
    kept, found = tensors(base), tensors(report.out / "model.gguf")
    for name, tensor in kept.items():
        if "attn_q" not in name:
            assert found[name].data.tobytes() == tensor.data.tobytes(), name


def test_the_recipe_names_each_tensor_of_the_base_with_its_type(planned, base, tmp_path):
    report = exported(planned, MIXED, tmp_path / "out", base)
    pairs = [line.rsplit("=", 1) for line in (report.out / "tensor-types.txt").read_text().split()]
    matrices = [name for name, each in tensors(base).items() if len(each.shape) == 2]
    for name in matrices:
        kinds = [kind for pattern, kind in pairs if re.search(pattern, name)]
        found = tensors(report.out / "model.gguf")[name].tensor_type.name
        assert kinds == [found.lower()], name


def test_the_order_of_rows_is_that_of_the_base(planned, base, tmp_path):
    straight = converted(planned.folder, tmp_path / "straight.gguf", change=put_back)
    one, other = (
        exported(planned, {"q_proj": INT8}, tmp_path / name, path)
        for name, path in (("one", base), ("other", straight))
    )
    assert one.likeness.same_logits and other.likeness.same_logits
    name = "blk.0.attn_q.weight"
    ones, others = (tensors(each.out / "model.gguf")[name].data for each in (one, other))
    assert sorted(map(bytes, ones)) == sorted(map(bytes, others)) and (ones != others).any()


def put_back(name, tensor):
    """Undo the order in which `converted` writes queries and keys."""
    heads = 4 if "q_proj" in name else 2
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    pairs = tensor.reshape(heads, -1, 2, tensor.shape[1])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def test_a_base_of_another_model_is_refused_by_layer(planned, untied, tmp_path):
    other = converted(
        planned.folder,
        tmp_path / "other.gguf",
        change=lambda name, tensor: torch.roll(tensor, 1, -1) if "q_proj" in name else tensor,
    )
    with pytest.raises(PlanError, match=r"another weight for model.layers.0.self_attn.q_proj"):
        exported(planned, {"q_proj": INT8}, tmp_path / "out", other)
    assert not (tmp_path / "out").exists()


def test_a_base_whose_other_matrices_differ_is_refused(planned, tmp_path):
    half = converted(planned.folder, tmp_path / "half.gguf", change=lambda name, tensor: tensor / 2)
    with pytest.raises(PlanError, match=r"has other numbers for .* than the model: convert"):
        exported(planned, {"q_proj": INT8}, tmp_path / "out", half)


def test_a_quantized_base_is_refused(planned, tmp_path):
    quantized = converted(planned.folder, tmp_path / "q8.gguf", kind="Q8_0")
    with pytest.raises(PlanError, match=r"is quantized itself .*: give a 16-bit one"):
        exported(planned, {"q_proj": INT8}, tmp_path / "out", quantized)


@pytest.mark.parametrize("content", [b"", b"GGUF\x03\x00\x00\x00 and so on", b"no"])
def test_a_damaged_base_is_told_in_one_line(planned, tmp_path, content):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(PlanError, match="cannot be read as a GGUF") as error:
        exported(planned, {"q_proj": INT8}, tmp_path / "out", path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "names", "embedding"),
    [
        ("int8", {"token_embd.weight", "output.weight"}, "Q8_0"),
        ("head", {"token_embd.weight"}, "Q4_1"),
    ],
)
def test_the_embedding_is_rounded_if_asked(planned, base, tmp_path, kind, names, embedding):
    report = export_to_disk(
        planned.plan({"lm_head": INT4}),
        planned.folder,
        tmp_path / "out",
        to="gguf",
        facts=planned.facts,
        base=base,
        embedding=kind,
    )
    found = tensors(report.out / "model.gguf")
    assert {name for name in found if "blk" not in name and "norm" not in name} == names
    assert found["token_embd.weight"].tensor_type.name == embedding
    assert report.likeness.rounded == 1 and not report.likeness.same_logits
    assert report.likeness.moved == 0 and report.likeness.weights == 1
    assert not any("--embedding" in note for note in report.notes)


def test_a_table_that_is_one_tensor_with_the_head_is_one_tensor_there(planned, base, tmp_path):
    searched = Planned(planned.folder, tables=True)
    report = exported(searched, {"embed_tokens": INT4, "lm_head": INT4}, tmp_path / "out", base)
    found = tensors(report.out / "model.gguf")
    assert found["token_embd.weight"].tensor_type.name == "Q4_1" and "output.weight" not in found
    assert report.likeness.same_logits and not report.likeness.others_differ


def test_a_table_of_its_own_is_refused_with_what_can_be_held(planned, base, tmp_path):
    searched = Planned(planned.folder, tables=True)
    with pytest.raises(PlanError, match=r"embed_tokens.*or as one tensor with a head"):
        exported(searched, {"embed_tokens": INT8, "lm_head": INT4}, tmp_path / "out", base)


@pytest.mark.parametrize("head", [("bfloat16/plain", "matmul"), ("bfloat16/routed", "matmul")])
def test_a_head_that_is_the_embedding_is_rounded_with_it(planned, base, tmp_path, head):
    report = export_to_disk(
        planned.plan({"q_proj": INT8, "lm_head": head}),
        planned.folder,
        tmp_path / "out",
        to="gguf",
        facts=planned.facts,
        base=base,
        embedding="int8",
    )
    found = tensors(report.out / "model.gguf")
    assert found["token_embd.weight"].tensor_type.name == "Q8_0" and "output.weight" not in found
    assert report.likeness.rounded == 2 and not report.likeness.others_differ


def test_the_tensor_of_an_unquantized_head_does_not_stand_for_the_embedding(
    planned, base, tmp_path
):
    with pytest.raises(PlanError, match=r"it is not: --embedding int8 rounds"):
        export_to_disk(
            planned.plan({"q_proj": INT8}),
            planned.folder,
            tmp_path / "out",
            to="gguf",
            facts=planned.facts,
            base=base,
            embedding="head",
        )
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_not_known_needs_a_base(planned, tmp_path):
    with pytest.raises(PlanError, match=r"kind WordLevel.* as --base .*convert_hf_to_gguf"):
        exported(planned, {"q_proj": INT8}, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_says_what_to_install(planned, base, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_writer.GgufWriter, "missing", lambda writer: ["gguf"])
    with pytest.raises(PlanError, match="needs the package gguf: pip install gguf"):
        exported(planned, {"q_proj": INT8}, tmp_path / "out", base)


def test_a_base_in_several_files_is_refused(planned, tmp_path):
    path = converted(planned.folder, tmp_path / "part.gguf", parts=2)
    with pytest.raises(PlanError, match="one of several files: merge them"):
        exported(planned, {"q_proj": INT8}, tmp_path / "out", path)


def test_a_base_is_refused_for_another_target(planned, base, tmp_path):
    with pytest.raises(PlanError, match="--base is for gguf"):
        export_to_disk(
            planned.plan({"q_proj": INT8}),
            planned.folder,
            tmp_path / "out",
            to="compressed-tensors",
            facts=planned.facts,
            base=base,
        )


def test_scales_that_float16_cannot_hold_are_refused(planned, base, tmp_path):
    tiny = (torch.randn(4, 64) * 1e-9).bfloat16()
    fmt = get_format("int8-row/plain")
    layer = ExportedLayer("tiny", Values("int8-row"), Scheme("Q8_0"), None)
    file = GgufFile(base)
    file.numbers = lambda name: tiny.float()
    made = gguf_writer._Copy(file, tmp_path / "out.gguf")
    with pytest.raises(
        CheckpointError, match=r"tiny as Q8_0 .* too small or too large for float16"
    ):
        made.add("blk.0.attn_q.weight", fmt.neutral(fmt.store(tiny)), layer)
