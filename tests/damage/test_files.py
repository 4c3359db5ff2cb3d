"""Damaged files of models, texts and recipes: one line names the file, in little time and memory."""

import json
import os
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch

import autoquant
from autoquant.cli.generate import _read as read_prompt
from autoquant.delivery.manifest import read_manifest
from autoquant.errors import AutoquantError, CheckpointError, ModelError, RecipeError, WorkloadError
from autoquant.evaluators.text import file_pieces
from autoquant.models import load_model
from autoquant.models.pretrained import pretrained
from autoquant.models.tokenizers import load_tokenizer
from autoquant.profiler.shapes import read_shapes
from autoquant.prompting import encode
from autoquant.recipes import read_recipe

GOLDEN = Path(__file__).parents[1] / "golden"
DEEP = "[" * 100_000 + "]" * 100_000
LAYER = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def saved(tmp_path):
    """A checkpoint."""
    return shutil.copytree(GOLDEN / "checkpoint", tmp_path / "saved")


@pytest.fixture
def model(tmp_path):
    """A model's folder."""
    return shutil.copytree(GOLDEN / "model", tmp_path / "model")


def refused(kind, read, *arguments):
    """What is said of a file, in one line and soon."""
    started = time.process_time()
    with pytest.raises(kind) as caught:
        read(*arguments)
    assert time.process_time() - started < 20
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def change_json(path, *keys, to):
    whole = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(whole))


def make_huge(path):
    """A file of 2 GiB without content, which takes no room on the disk."""
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, 2**31)


def repacked(path, compression=zipfile.ZIP_STORED, **entries):
    """Replace entries of an archive by the end of their names, with `__` for a dot."""
    with zipfile.ZipFile(path) as archive:
        whole = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in whole.items():
            new = [entries[end] for end in entries if name.endswith(end.replace("__", "."))]
            archive.writestr(name, new[0] if new else content)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("dtype",), "load"),
        (("dtype",), None),
        (("ties",), [1]),
        (("routed",), []),
        (("routed", LAYER, "route"), [["x", "matmul"]]),
        (("routed", LAYER, "route"), [[0, "matmul"]]),
        (("routed", LAYER, "route"), []),
        (("source",), {}),
        (("source", "kind"), "module"),
        (("joined",), "all"),
        (("format_version",), "1"),
        (("cpu_capability",), 7),
    ],
)
def test_a_manifest_is_held_to_its_fields(saved, keys, value):
    change_json(saved / "autoquant.json", *keys, to=value)
    assert "autoquant.json is damaged" in refused(CheckpointError, read_manifest, saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", DEEP, "\0", '{"format_version": 1}'])
def test_a_manifest_that_is_none_is_refused(saved, text):
    (saved / "autoquant.json").write_text(text)
    assert "autoquant.json is damaged" in refused(CheckpointError, read_manifest, saved)


def test_a_manifest_of_two_gigabytes_is_not_read(saved):
    make_huge(saved / "autoquant.json")
    assert "2,147,483,648 bytes" in refused(CheckpointError, read_manifest, saved)


@pytest.mark.parametrize("key", ["routed", "joined", "ties"])
def test_a_manifest_that_names_a_missing_tensor_is_refused(saved, key):
    manifest = json.loads((saved / "autoquant.json").read_text())
    value = {"x.y": {"format": "int8-row/plain", "route": [[None, "dequantize-matmul"]]}}
    added = value if key == "routed" else [["x.y", "x.z"]]
    new = manifest[key] | added if key == "routed" else manifest[key] + added
    change_json(saved / "autoquant.json", key, to=new)
    assert str(saved) in refused(AutoquantError, autoquant.load, saved)


@pytest.mark.parametrize("size", [0, 1, 100, 1000])
@pytest.mark.parametrize("name", ["packed.pt", "model.safetensors"])
def test_a_truncated_file_of_tensors_is_refused(saved, name, size):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:size])
    assert str(saved) in refused(CheckpointError, autoquant.load, saved)


def test_an_archive_of_tensors_that_would_blow_up_is_refused(saved):
    repacked(saved / "packed.pt", zipfile.ZIP_DEFLATED, data__pkl=b"\0" * 50_000_000)
    assert "compressed" in refused(CheckpointError, autoquant.load, saved)


def test_tensors_of_other_shapes_than_the_models_are_refused(saved):
    change_json(saved / "config.json", "hidden_size", to=32)
    assert "another architecture" in refused(CheckpointError, autoquant.load, saved)


def header(path, change):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    fields = json.loads(content[8 : 8 + length])
    change(fields)
    text = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def first_tensor(fields):
    return next(value for name, value in fields.items() if name != "__metadata__")


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: first_tensor(fields).update(shape=[2**40, 2**20]),
        lambda fields: first_tensor(fields).update(data_offsets=[0, 2**45]),
        lambda fields: first_tensor(fields).update(dtype="F64"),
        lambda fields: fields.update(more=first_tensor(fields)),
        lambda fields: fields.clear(),
    ],
)
@pytest.mark.parametrize("place", ["saved", "model"])
def test_a_header_that_lies_about_tensors_is_refused(saved, model, place, change):
    if place == "saved":
        header(saved / "model.safetensors", change)
        assert str(saved) in refused(CheckpointError, autoquant.load, saved)
    else:
        header(model / "model.safetensors", change)
        assert str(model) in refused(ModelError, load_model, model)


@pytest.mark.parametrize("length", [0, 2**31, 2**40, 2**63])
def test_a_header_of_terabytes_is_refused(model, length):
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert str(path) in refused(ModelError, load_model, model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**12),
        ("vocab_size", 10**9),
        ("intermediate_size", 10**10),
        ("num_labels", 10**9),
    ],
)
def test_a_configuration_of_a_far_larger_model_is_refused(model, field, value):
    change_json(model / "config.json", field, to=value)
    for read in (lambda: load_model(model), lambda: pretrained(model, torch.bfloat16)):
        assert "config.json" in refused(ModelError, read)
    if field == "num_labels":  # a tokenizer looks into it, too
        assert "config.json" in refused(ModelError, load_tokenizer, str(model))


@pytest.mark.parametrize("text", ["", "[]", DEEP, '{"model_type": []}'])
def test_a_configuration_that_is_none_is_refused(model, text):
    (model / "config.json").write_text(text)
    assert str(model) in refused(ModelError, load_model, model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_json_file_of_two_gigabytes_is_not_read(model, name):
    make_huge(model / name)
    assert "2,147,483,648 bytes" in refused(ModelError, load_model, model)


def test_a_tokenizer_whose_longest_text_is_no_number_is_refused(model):
    change_json(model / "tokenizer_config.json", "model_max_length", to="many")
    assert str(model) in refused(ModelError, load_tokenizer, str(model))


@pytest.mark.parametrize(("field", "value"), [("dtype", "float7"), ("hidden_act", [1])])
def test_a_configuration_that_a_tokenizer_stumbles_over_is_named(model, field, value):
    change_json(model / "config.json", field, to=value)
    assert f"cannot read {model / 'config.json'} (" in refused(
        ModelError, load_tokenizer, str(model)
    )


def test_a_tokenizer_without_words_is_named_when_it_reads_a_prompt(model):
    tokenizer = load_tokenizer(str(model))

    def stumble(*_arguments, **_options):
        raise Exception("Missing [UNK] token from the vocabulary")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tokenizer), "__call__", stumble)
        assert "tokenizer.json" in refused(ModelError, encode, tokenizer, "a word")


@pytest.mark.parametrize("text", ["", "{}", "[]", DEEP, '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_refused(model, text):
    (model / "tokenizer.json").write_text(text)
    assert str(model) in refused(ModelError, load_tokenizer, str(model))


@pytest.mark.parametrize(
    "text",
    ["batch = [" * 2000, "a = " + "[" * 20_000, "= 1", "batch = 1979-05-27", "\0", "[a]\nb=1"],
)
def test_a_damaged_recipe_is_refused(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert str(path) in refused(RecipeError, read_recipe, path)


def test_a_recipe_shapes_and_a_prompt_of_two_gigabytes_are_not_read(tmp_path):
    path = tmp_path / "huge.toml"
    make_huge(path)
    assert str(path) in refused(RecipeError, read_recipe, path)
    assert str(path) in refused(WorkloadError, read_shapes, path, "bfloat16")
    assert "2,147,483,648 bytes" in refused(AutoquantError, read_prompt, path)


def test_a_text_of_one_line_comes_in_pieces(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("word " * 400_000)
    pieces = list(file_pieces(path))
    assert "".join(pieces) == path.read_text() and max(map(len, pieces)) <= 400_000


def test_the_place_of_a_bad_byte_is_said_far_into_a_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("é".encode() * 150_001 + b"\xff")
    assert "at byte 300002" in refused(AutoquantError, list, file_pieces(path))


@pytest.fixture
def program(tmp_path):
    """An exported program."""
    module = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(module, (torch.ones(2, 8),)), path)
    return path


@pytest.mark.parametrize(
    "entries",
    [
        {"model_weights_config__json": b"{}"},
        {"model_weights_config__json": b"[" * 100_000},
        {"models/model__json": b"{}"},
        {"archive_format": b"\xff"},
        {"models/model__json": b'{"a": "\xff"}'},
        {"weight_0": b""},
    ],
)
def test_a_damaged_exported_program_is_refused(program, entries):
    repacked(program, **entries)
    assert str(program) in refused(ModelError, load_model, program)


def test_an_exported_program_that_would_blow_up_is_refused(program):
    repacked(program, zipfile.ZIP_DEFLATED, weight_0=b"\0" * 50_000_000)
    assert "compressed" in refused(ModelError, load_model, program)


@pytest.mark.parametrize("size", [4, 1000, -100])
def test_a_truncated_exported_program_is_refused(program, size):
    program.write_bytes(program.read_bytes()[:size])
    assert str(program) in refused(ModelError, load_model, program)
