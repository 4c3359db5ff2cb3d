"""Classifiers and encoder-decoders from a folder: searched, applied, loaded by transformers."""

import json

import pytest
import torch
import transformers as t
from models.tiny_models import tiny_tokenizer

import autoquant
from autoquant.delivery.on_disk import apply_to_disk
from autoquant.events import Notice

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("AUTOQUANT_EAGER", "1")
    monkeypatch.setenv("AUTOQUANT_IN_PROCESS", "1")


def search(folder, place, **options):
    said = []
    study = autoquant.search(
        folder,
        db=place / "plan.db",
        device="cpu",
        candidates=["int8-row/plain/*"],
        time_budget_s=1,
        max_ppl_increase=None,
        listener=lambda event: said.append(event.text) if isinstance(event, Notice) else None,
        **options,
    )
    return study, said


def quantized(study):
    return next(plan for plan in study.plans() if plan.layers)


def test_a_classifier_of_pictures_shows_the_accuracy_of_its_plans(tmp_path):
    torch.manual_seed(0)
    config = t.ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    folder = tmp_path / "vit"
    t.ViTForImageClassification(config).eval().save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    draw = torch.Generator().manual_seed(0)
    with rows.open("w") as file:
        for number in range(40):
            picture = torch.randint(256, (16, 16), generator=draw).tolist()
            file.write(json.dumps({"image": picture, "label": number % 3}) + "\n")
    study, said = search(folder, tmp_path, eval_data=str(rows))
    assert any("KL divergence of the probabilities" in text for text in said)
    shown = study.rows()
    assert all(row["measure"] == "divergence" for row in shown)
    assert all(0 <= row["accuracy"] <= 1 for row in shown)
    out = tmp_path / "out"
    apply_to_disk(quantized(study), str(folder), out, facts=study.facts)
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
    again = autoquant.load(out)
    other = t.AutoModelForImageClassification.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(again(**pixels).logits, other(**pixels).logits)


def test_an_encoder_decoder_generates_after_it_was_applied(tmp_path):
    torch.manual_seed(0)
    config = t.T5Config(
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=1,
        num_heads=2,
        vocab_size=64,
        decoder_start_token_id=60,
        pad_token_id=60,
        eos_token_id=61,
    )
    folder = tmp_path / "t5"
    t.T5ForConditionalGeneration(config).eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    study, said = search(folder, tmp_path, workload="prefill=8,decode=2")
    assert any("decoder's next-token probabilities" in text for text in said)
    assert {"prefill", "decode"} == set(study.facts.workload.calls())
    out = tmp_path / "out"
    apply_to_disk(quantized(study), str(folder), out, facts=study.facts)
    ids = torch.tensor([[1, 2, 3, 61]])
    again = autoquant.load(out)
    other = t.AutoModelForSeq2SeqLM.from_pretrained(out)
    assert torch.equal(again.generate(ids, max_new_tokens=5), other.generate(ids, max_new_tokens=5))
