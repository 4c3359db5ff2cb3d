"""Prefill and decode of models with an encoder and a decoder, and the workloads that fit them."""

from dataclasses import replace

import pytest
import torch
import transformers as t
from models.tiny_models import as_loaded, tiny_tokenizer

from autoquant.errors import WorkloadError
from autoquant.models.families import FAMILIES
from autoquant.models.reader import Reader
from autoquant.records import Workload
from autoquant.runtime.inputs import default_workload, start_ids, workload_inputs
from autoquant.runtime.phases import check_workload, make_phases
from autoquant.runtime.user_loop import Usage

SIZES = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 3}
ENCODED = SIZES | LAYERS | IDS | {"vocab_size": 64}


def t5():
    config = t.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=64, **IDS
    )
    return t.T5ForConditionalGeneration(config)


def bart():
    return t.BartForConditionalGeneration(t.BartConfig(**ENCODED, max_position_embeddings=64))


def whisper():
    config = t.WhisperConfig(
        **ENCODED, max_source_positions=50, max_target_positions=20, num_mel_bins=8
    )
    return t.WhisperForConditionalGeneration(config)


def loaded_of(model, folder, auto="AutoModelForSeq2SeqLM"):
    torch.manual_seed(0)
    words = None if auto.endswith("SpeechSeq2Seq") else tiny_tokenizer()
    if words is None:
        t.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    model = model().eval().requires_grad_(False)
    family = next(each for each in FAMILIES if each.auto == auto)
    reader = Reader(model, folder, words)
    loaded = as_loaded(model, kind="encoder_decoder", max_positions=reader.max_tokens)
    return replace(loaded, family=family, reader=reader, tokenizer=words)


@pytest.fixture(params=[t5, bart])
def loaded(request, tmp_path):
    return loaded_of(request.param, tmp_path)


def test_steps_with_caches_give_the_logits_of_one_pass(loaded):
    workload = Workload.parse("prefill=12,decode=3", 2)
    phases = make_phases(loaded, workload)
    ids = phases._ids
    inputs = workload_inputs(loaded, workload)
    expected = loaded.module(**inputs, decoder_input_ids=ids).logits
    for _ in range(2):  # a reset begins again
        phases.reset("prefill")
        assert torch.allclose(phases.run("prefill"), expected[:, :1], atol=1e-5)
        phases.reset("decode")
        steps = [phases.run("decode") for _ in range(phases.limit("decode"))]
        assert torch.allclose(torch.cat(steps, 1), expected[:, 1:], atol=1e-5)


def test_a_prefill_alone_has_no_steps(loaded):
    phases = make_phases(loaded, Workload.parse("prefill=12"))
    phases.reset("prefill")
    assert phases.run("prefill").shape == (1, 1, 64)


def test_a_decoder_starts_from_its_own_token(loaded):
    assert start_ids(loaded.module, 2, "cpu").tolist() == [[3], [3]]


def test_the_user_generates_as_many_tokens_as_the_workload_has(loaded):
    usage = Usage.of(loaded, Workload.parse("prefill=12,decode=5"))
    assert usage.loop == "generate"
    answer = usage.answer_of(loaded.module)
    assert answer.output.shape == (1, 1, 64) and answer.error(answer) == 0
    loop = usage.loop_of(loaded.module)
    assert loop.calls["request"]().shape == (1, 6)  # behind the token that it starts from
    before = torch.tensor([[3, 5]])
    inputs = workload_inputs(loaded, usage.workload)
    expected = loaded.module(**inputs, decoder_input_ids=before).logits[0, -1]
    assert torch.allclose(usage.next_logits(loaded.module, 0, before), expected, atol=1e-5)


def test_a_default_workload_goes_as_far_as_the_model_can(tmp_path):
    assert str(default_workload(loaded_of(bart, tmp_path), 1)) == "prefill=64,decode=63"
    assert str(default_workload(loaded_of(t5, tmp_path), 4)) == "prefill=512,decode=128 batch=4"
    speech = loaded_of(whisper, tmp_path, "AutoModelForSpeechSeq2Seq")
    assert str(default_workload(speech, 1)) == "prefill=50,decode=19"


@pytest.mark.parametrize(
    ("workload", "said"),
    [("decode=4", "reads its input first"), ("prefill=8,decode=64", "63"), ("prefill=65", "65")],
)
def test_a_workload_that_the_model_cannot_do_is_refused(tmp_path, workload, said):
    with pytest.raises(WorkloadError, match=said):
        check_workload(loaded_of(bart, tmp_path), Workload.parse(workload))


def test_sounds_fill_all_positions_of_the_encoder(tmp_path):
    speech = loaded_of(whisper, tmp_path, "AutoModelForSpeechSeq2Seq")
    with pytest.raises(WorkloadError, match="prefill=50"):
        check_workload(speech, Workload.parse("prefill=40,decode=4"))
    phases = make_phases(speech, Workload.parse("prefill=50,decode=2"))
    phases.reset("decode")
    assert phases.run("decode").shape == (1, 1, 64)


def test_a_model_that_generates_nothing_has_no_decode_phase(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = t.ViTForImageClassification(
        t.ViTConfig(**small, num_attention_heads=2, image_size=16, patch_size=8)
    )
    family = next(each for each in FAMILIES if each.auto == "AutoModelForImageClassification")
    reader = Reader(model, tmp_path, None)
    loaded = replace(as_loaded(model.eval(), kind="module"), family=family, reader=reader)
    with pytest.raises(WorkloadError, match="generates nothing"):
        check_workload(loaded, Workload.parse("prefill=8,decode=2"))
    with pytest.raises(WorkloadError, match="--batch"):
        check_workload(loaded, Workload.parse("prefill=8"))
    workload = default_workload(loaded, 3)
    loaded = replace(loaded, example_inputs=workload_inputs(loaded, workload))
    check_workload(loaded, workload)
    assert make_phases(loaded, workload).run("forward").shape == (3, 2)
