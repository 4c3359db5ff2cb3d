"""What lies beside the weights of a model is kept, and its copy is checked to be the same."""

import json
from dataclasses import replace

import pytest
import torch
from models.tiny_models import tiny_llama, tiny_tokenizer

import autoquant
from autoquant.delivery import checkpoint
from autoquant.delivery.beside import check_beside, copy_beside
from autoquant.errors import CheckpointError
from autoquant.models import load_model
from autoquant.records import Plan, Prediction

LINE = "w1 <|start|> w2 <eos> <|end|>"
PROMPT = torch.tensor([[5, 9, 33, 21, 7]])
BESIDE = {
    "preprocessor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages[0]['content'] }}",
    "additional_chat_templates/tool_use.jinja": "TOOLS {{ messages[0]['content'] }}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "spiece.model": "sentences",
    "tekken.json": "{}",
    "qwen.tiktoken": "",
    "my_words.dict": "of a tokenizer of its own",
    "LICENSE": "",
}
ELSEWHERE = (
    "pytorch_model.bin",
    "optimizer.pt",
    "model.safetensors.index.json",
    "plan.db",
    "plan.db-wal",
    ".env",
    "notes.log",
    "modeling_own.py",
    "checkpoint-5/config.json",
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    tiny_llama(tied=True).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|start|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def write(path, content=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def written(loaded, out):
    """Write a model that no weight of is quantized, and read it back."""
    plan = Plan(
        plan_id="abcd",
        study_id="study",
        label="original",
        kind="original",
        model_hash=loaded.content_hash,
        dtype=loaded.dtype,
        layers=(),
        prediction=Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=0),
    )
    out.mkdir()
    checkpoint.write(loaded, plan, out)
    return autoquant.load(out)


def test_everything_beside_the_weights_is_copied(folder, tmp_path):
    for name, content in BESIDE.items():
        write(folder / name, content)
    for name in ELSEWHERE:
        write(folder / name)
    before = names(folder) - set(ELSEWHERE)
    loaded = replace(load_model_of(folder), tokenizer=None)
    out = tmp_path / "out"
    out.mkdir()
    assert copy_beside(loaded, out)
    assert names(out) == before - {"model.safetensors"}
    assert all((out / name).read_text() == content for name, content in BESIDE.items())


def load_model_of(folder):
    """Load the model without the made-up files, which no tokenizer can read."""
    hidden = folder.with_name("hidden")
    folder.rename(hidden)
    tiny_llama(tied=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    loaded = load_model(folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    hidden.rename(folder)
    return loaded


def test_beside_a_file_of_weights_only_known_files_are_copied(folder, tmp_path):
    torch.save(tiny_llama(tied=True).state_dict(), folder / "mine.pt")
    write(folder / "secrets.txt")
    out = tmp_path / "out"
    out.mkdir()
    assert copy_beside(load_model(folder / "mine.pt"), out)
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names(out)
    assert "secrets.txt" not in names(out)


def test_the_copy_has_the_same_tokens_and_chat_templates(folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "A", "tool_use": "B"}
    tokenizer.save_pretrained(folder)
    loaded = load_model(folder)
    check_beside(loaded, written(loaded, tmp_path / "out"), tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(LINE).input_ids == tokenizer(LINE).input_ids
    assert again.chat_template == tokenizer.chat_template


def test_stop_ids_and_other_generation_settings_are_kept(folder, tmp_path):
    settings = {"eos_token_id": [2, 11], "pad_token_id": 0, "do_sample": False, "temperature": None}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    loaded = load_model(folder)
    again = written(loaded, tmp_path / "out")
    check_beside(loaded, again, tmp_path / "out")
    assert again.generation_config.eos_token_id == [2, 11]


def test_stop_ids_that_only_the_configuration_has_are_kept(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 12]}))
    (folder / "generation_config.json").unlink()
    loaded = load_model(folder)
    again = written(loaded, tmp_path / "out")
    check_beside(loaded, again, tmp_path / "out")
    assert again.generation_config.eos_token_id == [2, 12]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda out, _again: tiny_tokenizer().save_pretrained(out), "token ids"),
        (lambda _out, again: setattr(again.generation_config, "eos_token_id", 3), "eos_token_id"),
        (lambda out, _again: write(out / "chat_template.jinja", "other"), "chat_template"),
    ],
)
def test_a_copy_that_differs_is_refused_with_what_differs(folder, tmp_path, change, named):
    loaded, out = load_model(folder), tmp_path / "out"
    again = written(loaded, out)
    change(out, again)
    with pytest.raises(CheckpointError, match=named):
        check_beside(loaded, again, out)


def test_a_tokenizer_given_apart_replaces_the_folders_own(folder, tmp_path):
    write(folder / "added_tokens.json", json.dumps({"<|old|>": 70}))
    apart = tmp_path / "words"
    tiny_tokenizer().save_pretrained(apart)
    loaded, out = load_model(folder, tokenizer=str(apart)), tmp_path / "out"
    check_beside(loaded, written(loaded, out), out)
    assert "added_tokens.json" not in names(out)
