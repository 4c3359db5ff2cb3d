"""The table of kinds: which class of transformers loads a folder."""

import pytest

from autoquant.models.families import BARE, CAUSAL_LM, FAMILIES, class_names, family_of


@pytest.mark.parametrize(
    ("model_type", "named", "auto"),
    [
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("llama", "LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("bert", "BertForTokenClassification", "AutoModelForTokenClassification"),
        ("bert", "BertForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("qwen3", "Qwen3Model", "AutoModel"),
        ("t5", "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("t5", "T5EncoderModel", "AutoModelForTextEncoding"),
        ("bart", "BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("whisper", "WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        ("wav2vec2", "Wav2Vec2ForCTC", "AutoModelForCTC"),
        ("vit", "ViTForImageClassification", "AutoModelForImageClassification"),
        ("clip", "CLIPModel", "AutoModel"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", "AutoModelForImageTextToText"),
        ("funnel", "FunnelBaseModel", "AutoModel"),
    ],
)
def test_the_class_that_a_configuration_names_decides(model_type, named, auto, tmp_path):
    family = family_of({"model_type": model_type, "architectures": [named]}, tmp_path)
    assert family is not None and family.auto == auto


def test_a_class_of_no_known_kind_has_no_family(tmp_path):
    assert (
        family_of({"model_type": "bert", "architectures": ["BertForMultipleChoice"]}, tmp_path)
        is None
    )


def test_without_a_named_class_only_a_causal_model_is_assumed(tmp_path):
    assert family_of({"model_type": "llama"}, tmp_path) is CAUSAL_LM
    assert family_of({"model_type": "vit"}, tmp_path) is None


def test_a_list_of_modules_makes_an_embedder_of_any_class(tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    assert family_of({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, tmp_path) is BARE


def test_code_in_the_folder_has_the_family_of_the_class_that_it_brings(tmp_path):
    config = {
        "model_type": "mine",
        "architectures": ["MyEncoder"],
        "auto_map": {"AutoModel": "my.MyEncoder", "AutoModelForMaskedLM": "my.MyMasked"},
    }
    assert family_of(config, tmp_path) is BARE


def test_transformers_has_the_class_and_the_table_of_every_family():
    import transformers

    for family in FAMILIES:
        assert hasattr(transformers, family.auto)
        types = ("bert", "t5", "whisper", "vit", "wav2vec2", "llava", "segformer", "dpt", "detr")
        assert any(class_names(family, each) for each in types), family.mapping
