"""Accuracy of plans on a dataset with labels."""

import json

import pytest
import torch
import transformers as t
from models.tiny_models import tiny_tokenizer

from autoquant.errors import TaskError
from autoquant.models import load_model
from autoquant.tuner.labels import _labelled, _score

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def folder_of(model, place):
    model.eval().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return load_model(place)


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(0)
    return folder_of(
        t.BertForSequenceClassification(t.BertConfig(**SMALL, num_labels=3)), tmp_path / "model"
    )


def rows_file(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def predicted(loaded, text):
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    return int(loaded.module(ids).logits.argmax())


def test_a_classifier_is_right_where_the_label_is_its_most_likely_class(classifier, tmp_path):
    texts = ["w1 w2 w3", "w4 w5 w6", "w7 w8", "w9 w10"]
    labels = [predicted(classifier, text) for text in texts]
    labels[3] = (labels[3] + 1) % 3
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    data = rows_file(tmp_path, rows)
    made = _labelled(classifier, data, None)
    score = _score(classifier, classifier.module, made, data, None)
    assert (score.metric, score.value, score.samples) == ("accuracy", 0.75, 4)
    assert score.stderr == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_rows_without_labels_are_refused_with_the_column_to_add(classifier, tmp_path):
    data = rows_file(tmp_path, [{"text": "w1"}, {"text": "w2", "label": 0}])
    with pytest.raises(TaskError, match="called label"):
        _labelled(classifier, data, None)


def test_a_model_without_classes_is_refused(tmp_path):
    loaded = folder_of(t.BertForMaskedLM(t.BertConfig(**SMALL)), tmp_path / "model")
    data = rows_file(tmp_path, [{"text": "w1", "label": 0}])
    with pytest.raises(TaskError, match="this model is none"):
        _labelled(loaded, data, None)


def test_an_answer_is_right_as_a_whole(tmp_path, monkeypatch):
    config = t.T5Config(
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        vocab_size=64,
        decoder_start_token_id=60,
        pad_token_id=60,
        eos_token_id=61,
    )
    loaded = folder_of(t.T5ForConditionalGeneration(config), tmp_path / "model")
    asked = []

    def says_three_words(ids, **options):
        asked.append(options["max_new_tokens"])
        return torch.tensor([[60, 3, 4, 5, 61]] * len(ids))

    monkeypatch.setattr(loaded.module, "generate", says_three_words)
    targets = ["w3 w4 w5", "w3 w4", "w3 w4 w6", "w3 w4 w5"]
    data = rows_file(tmp_path, [{"text": "w1 w2", "target": target} for target in targets])
    made = _labelled(loaded, data, None)
    score = _score(loaded, loaded.module, made, data, None)
    assert (score.metric, score.value, score.samples) == ("exact match", 0.5, 4)
    assert min(asked) > 3  # an answer that is too long has room to be wrong
