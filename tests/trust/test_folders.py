"""A Hugging Face folder names code and paths: `auto_map`, kernels, indices, templates."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from end_to_end.tiny import save_text
from transformers import AutoModelForCausalLM

from autoquant.errors import ModelError, TrustError
from autoquant.models import load_model
from autoquant.models.pretrained import from_config, pretrained
from autoquant.models.tokenizers import load_tokenizer

from .conftest import change, done, refused

MODEL = """
import os
from transformers import LlamaConfig, LlamaForCausalLM

os.makedirs({marker!r}, exist_ok=True)

class OwnConfig(LlamaConfig):
    model_type = "own_of_a_test"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


@pytest.fixture
def own(folder, marker, tmp_path, monkeypatch):
    """A folder whose model is made by code in it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    (folder / "modeling_own.py").write_text(MODEL.format(marker=str(marker)))
    change(folder / "config.json", model_type="own_of_a_test", auto_map=AUTO_MAP)
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


COMMANDS = {
    "search": ("search",),
    "profile": ("profile", "--rows", "1", "--candidates", "int8-row/plain/int8pack-mm"),
    "generate": ("generate", "--prompt", "w1"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_code_of_a_folder_does_not_run(own, command, marker):
    message = refused(*command, own)
    assert "pass --trust-remote-code" in message and "modeling_own.OwnModel" in message
    assert not marker.exists()


def test_the_code_of_a_folder_is_not_served(own, marker):
    pytest.importorskip("fastapi")
    assert "--trust-remote-code" in refused("serve", own, "--port", "18231")
    assert not marker.exists()


def test_named_in_the_command_the_code_runs(own, marker):
    said = done("generate", own, "--prompt", "w1", "--max-new-tokens", "2", "--trust-remote-code")
    assert said.startswith("w1") and marker.exists()


@pytest.mark.slow
def test_a_model_of_own_code_is_searched_applied_and_used_by_who_names_it(own, tmp_path, marker):
    named, out, db = "--trust-remote-code", tmp_path / "out", tmp_path / "plan.db"
    text = save_text(tmp_path / "text.txt")
    few = ("--candidates", "int8-row/plain/int8pack-mm", "--time-budget", "1s", "--device", "cpu")
    judged = ("--eval-text", text, "--max-ppl-increase", "1000%", "--minimize", "memory")
    work = ("--workload", "prefill=8,decode=4")
    said = done("search", own, named, *few, *judged, *work, "--db", db)
    assert f"autoquant apply {db} {named}" in said
    marker.rmdir()
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    for command in (("apply", db), ("bench", db), ("bench", db, "--loop", "generate")):
        assert f"add {named}" in refused(*command)
    assert not marker.exists()
    said = done("apply", db, named, "--out", out)
    assert "bit for bit" in said and f"--prompt TEXT {named}" in said
    assert "Request" in done("bench", db, named)
    assert named in refused("generate", out, "--prompt", "w1")
    assert done("generate", out, "--prompt", "w1", "--max-new-tokens", "2", named).startswith("w1")
    assert (
        type(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)).__name__
        == "OwnModel"
    )


def test_the_hash_of_the_model_covers_the_code_that_runs(own):
    first = load_model(str(own), trust_remote_code=True)
    assert len(first.source.code_hash) == 64
    with (own / "modeling_own.py").open("a") as file:
        file.write("# changed\n")
    assert load_model(str(own), trust_remote_code=True).content_hash != first.content_hash


def test_code_that_was_changed_since_the_search_is_refused_before_it_runs(own, marker):
    from autoquant.models import load_request

    source = load_model(str(own), trust_remote_code=True).source
    marker.rmdir()
    (own / "modeling_own.py").write_text(MODEL.format(marker=str(marker)) + "# changed\n")
    with pytest.raises(ModelError, match="holds other code than it did when it was searched"):
        load_request(source.request(dtype="auto", device="cpu"))
    assert not marker.exists()


def test_a_folder_without_code_has_the_same_hash_with_the_flag(folder):
    hashes = [
        load_model(str(folder), trust_remote_code=trust).content_hash for trust in (False, True)
    ]
    assert hashes[0] == hashes[1]


def test_a_known_model_is_loaded_without_the_code_beside_it(own, marker):
    change(own / "config.json", model_type="llama")
    assert load_model(str(own)).kind == "causal_lm"
    assert not marker.exists()


def test_transformers_does_not_ask_at_the_terminal_by_itself(own, monkeypatch, marker):
    config = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
    (own / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what it would ask with
    with pytest.raises(TrustError, match="--trust-remote-code"):
        from_config(own, torch.float32)
    assert not marker.exists()


def test_code_of_another_repository_is_refused_also_with_trust(own):
    away = {name: f"someone/else--{value}" for name, value in AUTO_MAP.items()}
    change(own / "config.json", auto_map=away)
    with pytest.raises(ModelError, match="names code of another place"):
        load_model(str(own), trust_remote_code=True)


def test_the_code_of_a_tokenizer_does_not_run(folder, marker):
    (folder / "own_words.py").write_text(f"import os\nos.makedirs({str(marker)!r})\n")
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnWords",
        auto_map={"AutoTokenizer": ["own_words.OwnWords", None]},
    )
    try:
        load_tokenizer(str(folder))  # transformers may fall back to tokenizer.json
    except TrustError as error:
        assert "own_words.OwnWords" in str(error)
    assert not marker.exists()


def test_a_custom_generate_does_not_run(folder, marker):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"import os\nos.makedirs({str(marker)!r})\ndef generate(model, **_): ...\n"
    )
    change(folder / "generation_config.json", custom_generate="./custom_generate")
    done("generate", folder, "--prompt", "w1", "--max-new-tokens", "2")
    assert not marker.exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_compiled_code_is_not_fetched_from_the_hub(folder, monkeypatch, field):
    fetched = []
    monkeypatch.setitem(sys.modules, "kernels", types.ModuleType("kernels"))
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention",
        lambda *given, **_: fetched.append(given),
    )
    change(folder / "config.json", **{field: "kernels-community/evil"})
    assert "kernels-community/evil" in refused("search", folder)
    assert "kernels-community/evil" in refused("generate", folder, "--prompt", "w1")
    assert fetched == []


def test_a_part_of_a_model_fetches_no_compiled_code_either(folder):
    change(folder / "config.json", text_config={"attn_implementation": {"": "someone/kernel"}})
    with pytest.raises(TrustError, match="someone/kernel"):
        load_model(str(folder))


@pytest.mark.parametrize("settings", [{"options": {"cpp.cxx": "/bin/false"}}, {"backend": "evil"}])
def test_settings_of_the_compiler_are_not_taken_from_a_folder(folder, settings):
    change(folder / "generation_config.json", compile_config=settings)
    try:
        kept = load_model(str(folder)).module.generation_config.compile_config
    except ModelError:
        return
    assert kept is None


@pytest.mark.parametrize("away", ["../elsewhere.safetensors", "/etc/hostname"])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder, tmp_path, away):
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": away}}))
    assert "names weights of another folder" in refused("search", folder)
    with pytest.raises(ModelError, match="names weights of another folder"):
        pretrained(folder, None)


def test_a_configuration_that_names_other_weights_is_refused(folder):
    change(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(ModelError, match="names other weights"):
        load_model(str(folder))


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file"])
def test_a_tokenizer_takes_no_file_of_another_folder(tmp_path, key):
    folder, words = tmp_path / "words", {"<unk>": 0, "w1": 1}
    folder.mkdir()
    (tmp_path / "away.json").write_text(json.dumps(words | {"w2": 2}))
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n\n")
    (folder / "config.json").write_text('{"model_type": "ctrl"}')
    settings = {"tokenizer_class": "CTRLTokenizer", key: str(tmp_path / "away.json")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert len(load_tokenizer(str(folder))) == len(words)


def test_a_chat_template_runs_in_a_sandbox(folder, marker):
    change(
        folder / "tokenizer_config.json",
        chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"
        "{{ cycler.__init__.__globals__.os.makedirs('" + str(marker) + "') }}",
    )
    message = refused("generate", folder, "--chat")
    assert "chat template does not take the conversation" in message
    assert not marker.exists()
