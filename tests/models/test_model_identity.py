"""Folders of other kinds than causal language models, and folders that are not what they say."""

import json

import pytest
import torch
import transformers as t
from models.tiny_models import tiny_llama, tiny_tokenizer

from autoquant.errors import ModelError
from autoquant.models import from_module, load_model

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 1, "pad_token_id": 1, "tie_word_embeddings": True}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
ENCODED = HEADS | LAYERS | {"d_model": 32, "vocab_size": 64}
OTHERS = {
    "a tied classifier": lambda: t.Qwen2ForSequenceClassification(t.Qwen2Config(**GROUPED)),
    "a classifier of tokens": lambda: t.Qwen2ForTokenClassification(t.Qwen2Config(**GROUPED)),
    "an embedder": lambda: t.Qwen2Model(t.Qwen2Config(**GROUPED)),
    "an untied classifier": lambda: t.LlamaForSequenceClassification(
        t.LlamaConfig(**SMALL, pad_token_id=1)
    ),
    "a question answerer": lambda: t.LlamaForQuestionAnswering(t.LlamaConfig(**SMALL)),
    "a masked LM": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL)),
    "a classifier of BERT": lambda: t.BertForSequenceClassification(t.BertConfig(**SMALL)),
    "an encoder and decoder": lambda: t.BartForConditionalGeneration(t.BartConfig(**ENCODED)),
    "speech": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            **ENCODED, pad_token_id=1, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0
        )
    ),
    "a picture classifier": lambda: t.ViTForImageClassification(
        t.ViTConfig(**(SMALL | {"vocab_size": 1}), image_size=16, patch_size=8)
    ),
}


def saved(model, folder, **config):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    edit(folder, **config)
    return folder


def edit(folder, **changes):
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


@pytest.mark.parametrize("form", ["folder", "bin", "file"])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_is_loaded_as_the_class_that_its_configuration_names(kind, form, tmp_path):
    torch.manual_seed(0)
    model = OTHERS[kind]().eval()
    path = folder = saved(model, tmp_path / "model")
    if kind == "speech":
        t.WhisperFeatureExtractor().save_pretrained(folder)
    if form != "folder":
        (folder / "model.safetensors").unlink()
        path = folder / ("pytorch_model.bin" if form == "bin" else "mine.pt")
        torch.save(model.state_dict(), path)
    loaded = load_model(folder if form == "bin" else path)
    assert type(loaded.module) is type(model)
    assert loaded.kind == ("encoder_decoder" if model.config.is_encoder_decoder else "module")
    expected = dict(model.named_parameters())
    assert all(
        torch.equal(value, expected[name]) for name, value in loaded.module.named_parameters()
    )
    assert loaded.reader is not None and loaded.family is not None


def test_a_kind_without_a_judge_is_refused_by_its_class_with_the_way_to_search_it(
    tmp_path, refusal
):
    folder = saved(t.BertForMultipleChoice(t.BertConfig(**SMALL)), tmp_path / "model")
    message = refusal(ModelError, load_model, folder)
    assert "BertForMultipleChoice" in message and str(folder) in message
    assert "--model-factory" in message and "--quality" in message
    assert "download" not in message


@pytest.mark.parametrize("kind", ["a tied classifier", "an embedder", "a masked LM", "speech"])
def test_another_kind_whose_class_is_not_named_is_refused(kind, tmp_path, refusal):
    model = OTHERS[kind]()
    folder = saved(model, tmp_path / "model", architectures=None)
    if kind == "a masked LM":  # has the same names as a causal BERT; running it shows the rest
        assert load_model(folder).kind
        return
    assert "model" in refusal(ModelError, load_model, folder)


def test_a_causal_model_whose_class_is_not_named_is_loaded(tmp_path):
    folder = saved(tiny_llama(tied=True), tmp_path / "model", architectures=None)
    assert load_model(folder).kind == "causal_lm"


def test_a_causal_model_saved_without_its_head_is_loaded_if_its_class_is_named(tmp_path):
    model = tiny_llama(tied=True)
    folder = saved(model.model, tmp_path / "model", architectures=["LlamaForCausalLM"])
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(load_model(folder).module(ids).logits, model(ids).logits)


@pytest.mark.parametrize("named", ["Mine", "BertForMaskedLM", "LlamaForSequenceClassification"])
def test_a_class_that_the_configuration_names_wrongly_is_refused(tmp_path, refusal, named):
    folder = saved(tiny_llama(), tmp_path / "model", architectures=[named])
    message = refusal(ModelError, load_model, folder)
    assert named in message
    assert ("LlamaForCausalLM" in message) is (named == "Mine")


@pytest.mark.parametrize("key", ["score.weight", "model.encoder.weight", "lm_head.bias"])
def test_weights_that_have_no_place_are_refused(tmp_path, refusal, key):
    from safetensors.torch import load_file, save_file

    folder = saved(tiny_llama(), tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    stored[key] = torch.ones(3)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(ModelError, load_model, folder)
    assert key in message and "LlamaForCausalLM" in message and "--quality" in message


def test_a_sentence_embedder_is_loaded_without_its_head_whatever_its_class(tmp_path):
    folder = saved(tiny_llama(), tmp_path / "model")
    (folder / "modules.json").write_text("[]")
    loaded = load_model(folder)
    assert type(loaded.module).__name__ == "LlamaModel"
    assert loaded.family.judged_by == "vectors"
    assert any("lm_head.weight" in note for note in loaded.notes)


def test_an_embedder_saved_without_a_pooler_is_loaded_without_one(tmp_path):
    model = t.BertModel(t.BertConfig(**SMALL), add_pooling_layer=False)
    loaded = load_model(saved(model, tmp_path / "model"))
    assert loaded.module.pooler is None


def test_a_classifier_without_a_tokenizer_is_refused_with_what_to_do(tmp_path, refusal):
    folder = tmp_path / "model"
    OTHERS["a classifier of BERT"]().save_pretrained(folder)
    assert "--tokenizer" in refusal(ModelError, load_model, folder)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused_with_how_to_merge_it(tmp_path, refusal, whole):
    folder = saved(tiny_llama(), tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    if not whole:
        (folder / "config.json").unlink()
    assert "merge_and_unload" in refusal(ModelError, load_model, folder)


def test_attention_that_is_not_installed_is_replaced(tmp_path):
    model = tiny_llama()
    folder = saved(model, tmp_path / "model", _attn_implementation="flash_attention_2")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(load_model(folder).module(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["a classifier of tokens", "an embedder", "a tied classifier"])
def test_a_live_model_of_another_kind_is_no_language_model(kind):
    assert from_module(OTHERS[kind]().eval(), tokenizer=tiny_tokenizer()).kind == "module"
