"""A GGUF made of a folder: settings, tensors, and models that are refused."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.targets import gguf_vocab
from autoquant.delivery.targets.gguf_convert import Conversion
from autoquant.delivery.targets.gguf_file import GgufFile
from autoquant.errors import PlanError
from autoquant.models import load_model
from delivery.targets.conftest import Planned
from delivery.targets.test_gguf import INT8, converted, tensors

gguf = pytest.importorskip("gguf")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def saved(folder, model):
    """Save a model with a tokenizer of bytes, and read it as a user's."""
    model.to(torch.bfloat16).save_pretrained(folder)
    letters = {text: n for n, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | settings))


def made(folder, path):
    Conversion.of(load_model(folder)).write("bfloat16", path)
    return path


def fields(path):
    found = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in found.items()}


def test_a_llama_is_written_as_llama_cpps_converter_writes_it(tmp_path):
    folder = saved(tmp_path / "model", llama(tie_word_embeddings=True))
    ours = made(folder, tmp_path / "ours.gguf")
    theirs = converted(folder, tmp_path / "theirs.gguf")
    one, other = tensors(ours), tensors(theirs)
    assert set(one) == set(other) and "output.weight" not in one
    for name, tensor in one.items():
        assert tensor.tensor_type == other[name].tensor_type, name
        assert tensor.data.tobytes() == other[name].data.tobytes(), name
    found, expected = fields(ours), fields(theirs)
    same = [name for name in expected if name.startswith("llama.")]
    assert len(same) == 10 and all(found[name] == expected[name] for name in same)


@pytest.mark.parametrize(
    ("architecture", "kind", "config", "pairs", "extra"),
    [
        ("llama", MistralForCausalLM, MistralConfig, True, set()),
        ("qwen2", Qwen2ForCausalLM, Qwen2Config, False, {"attn_q.bias", "attn_v.bias"}),
        ("qwen3", Qwen3ForCausalLM, Qwen3Config, False, {"attn_q_norm.weight"}),
    ],
)
def test_each_architecture_has_its_names_and_order_of_rows(
    tmp_path, architecture, kind, config, pairs, extra
):
    torch.manual_seed(0)
    model = kind(config(**SIZES, head_dim=32, tie_word_embeddings=False))
    folder = saved(tmp_path / "model", model)
    path = made(folder, tmp_path / "made.gguf")
    file = GgufFile(path)
    assert file.architecture == architecture
    assert fields(path)[f"{architecture}.attention.key_length"] == 32
    assert {f"blk.1.{name}" for name in extra} | {"output.weight"} <= set(file.tensors)
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        if tensor.ndim == 2:
            order, error = file.order_of(tensor.float(), file.numbers(file.name_of(name)))
            moved = order.tolist() != list(range(len(order)))
            assert error == 0 and moved == (pairs and ("q_proj" in name or "k_proj" in name)), name


def test_scaled_rotary_embeddings_are_told(tmp_path):
    plain = saved(tmp_path / "plain", llama(rope_parameters=LLAMA3))
    factors = GgufFile(made(plain, tmp_path / "a.gguf")).numbers("rope_freqs.weight")
    inverse = AutoModelForCausalLM.from_pretrained(plain).model.rotary_emb.inv_freq
    unscaled = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(unscaled / factors, inverse, rtol=1e-5)
    assert factors[0] == 1 and factors[-1] == 8
    linear = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    other = fields(made(saved(tmp_path / "b", llama(rope_parameters=linear)), tmp_path / "b.gguf"))
    assert other["llama.rope.scaling.type"] == "linear"
    assert other["llama.rope.scaling.factor"] == 2 and other["llama.rope.freq_base"] == 500


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=260)),
            r"no GGUF is made here of a GPT2LMHeadModel, only of Llama.* as --base",
        ),
        (lambda: llama(hidden_act="gelu"), r"not compute LlamaForCausalLM with hidden_act=gelu"),
        (
            lambda: llama(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            r"rotary embeddings of .*rope_type=dynamic.* as --base",
        ),
    ],
)
def test_a_model_that_is_not_known_is_refused_before_any_work(tmp_path, model, message):
    folder = saved(tmp_path / "model", model())
    with pytest.raises(PlanError, match=message):
        made(folder, tmp_path / "made.gguf")
    assert not (tmp_path / "made.gguf").exists()


def test_a_sliding_window_that_llama_cpp_does_not_have_is_said(tmp_path):
    notes = {
        window: Conversion.of(
            load_model(
                saved(
                    tmp_path / str(window),
                    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)),
                )
            )
        ).notes
        for window in (None, 32)
    }
    assert notes[None] == () and "attends to the last 32" in notes[32][0]


def test_an_export_needs_no_base_and_reads_the_tokenizer_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        gguf_vocab, "_state", lambda each, state=gguf_vocab._state: read.append(1) or state(each)
    )
    planned = Planned(saved(tmp_path / "model", llama(tie_word_embeddings=False)))
    report = export_to_disk(
        planned.plan({"q_proj": INT8, "lm_head": INT8}),
        planned.folder,
        tmp_path / "out",
        to="gguf",
        facts=planned.facts,
    )
    assert report.files == ("model.gguf", "tensor-types.txt")
    assert report.likeness.same_logits and report.likeness.weights == 3
    assert len(read) == 1
    found = tensors(report.out / "model.gguf")
    assert found["output.weight"].tensor_type.name == "Q8_0"
    assert found["blk.0.attn_k.weight"].tensor_type.name == "BF16"


def test_a_plan_that_quantizes_nothing_is_the_unquantized_gguf(tmp_path):
    planned = Planned(saved(tmp_path / "model", llama(tie_word_embeddings=True)))
    report = export_to_disk(
        planned.plan({}), planned.folder, tmp_path / "out", to="gguf", facts=planned.facts
    )
    assert report.files == ("model.gguf",) and report.schemes == {}
    assert report.likeness.same_logits and report.notes == ()
    alone = made(planned.folder, tmp_path / "alone.gguf")
    one, other = tensors(report.out / "model.gguf"), tensors(alone)
    assert all(one[name].data.tobytes() == other[name].data.tobytes() for name in other)
