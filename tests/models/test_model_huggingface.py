import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoquant.errors import DeviceError, ModelError, WorkloadError
from autoquant.models import load_model
from autoquant.models.pretrained import from_config, pretrained

IDS = torch.tensor([[3, 4, 5]])


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_loaded_as_a_causal_lm_ready_to_run(save_llama):
    folder, model = save_llama()
    loaded = load_model(folder)
    assert (loaded.kind, loaded.max_positions, loaded.stored_dtype) == (
        "causal_lm",
        128,
        "bfloat16",
    )
    assert (loaded.dtype, loaded.device, loaded.example_inputs) == ("bfloat16", "cpu", None)
    assert not loaded.module.training and not any(
        p.requires_grad for p in loaded.module.parameters()
    )
    assert loaded.tokenizer("w1 w2").input_ids == [1, 2]
    torch.testing.assert_close(loaded.module(IDS).logits, model(IDS).logits, rtol=0, atol=0)


def test_the_source_says_how_to_load_the_model_again(save_llama):
    from dataclasses import asdict

    folder, _ = save_llama()
    source = load_model(str(folder)).source
    assert json.loads(json.dumps(asdict(source))) == {
        "kind": "huggingface",
        "path": str(folder),
        "model_factory": None,
        "tokenizer": None,
        "trust_pickle": False,
        "sample_inputs": None,
        "trust_remote_code": False,
        "file_hash": None,
        "code_hash": None,
    }


def test_the_hash_does_not_depend_on_folder_sharding_or_library_version(save_llama):
    folder, _ = save_llama("one")
    sharded, _ = save_llama("another", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    _edit_config(sharded, transformers_version="5.0.0", _name_or_path="elsewhere")
    assert load_model(folder).content_hash == load_model(sharded).content_hash


def test_another_weight_or_another_architecture_is_another_hash(save_llama):
    folder, _ = save_llama("one")
    first = load_model(folder).content_hash
    other, _ = save_llama("other", seed=1)
    assert load_model(other).content_hash != first
    _edit_config(folder, rms_norm_eps=1e-3)
    assert load_model(folder).content_hash != first


def test_a_cast_changes_the_dtype_but_not_the_hash(save_llama):
    folder, _ = save_llama()
    stored, cast = load_model(folder), load_model(folder, dtype="fp32")
    assert cast.module.lm_head.weight.dtype is torch.float32
    assert (cast.stored_dtype, cast.content_hash) == ("bfloat16", stored.content_hash)


def test_tied_weights_stay_tied_and_the_hash_is_stable(save_llama):
    folder, _ = save_llama(tied=True)
    loaded = load_model(folder, dtype="fp32")
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight
    assert loaded.content_hash == load_model(folder).content_hash


def test_loading_prints_nothing_and_leaves_the_progress_bars_as_they_were(save_llama, capfd):
    from transformers.utils import logging

    folder, _ = save_llama(max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    save_file(
        load_file(shards[0]) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        shards[0],
        metadata={"format": "pt"},
    )
    before = logging.is_progress_bar_enabled()
    capfd.readouterr()
    load_model(folder)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() is before


def test_code_in_a_model_folder_is_not_run(save_llama, tmp_path, refusal):
    folder, _ = save_llama()
    mark = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    classes = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    _edit_config(folder, model_type="own", auto_map=classes)
    assert str(folder) in refusal(ModelError, load_model, folder)
    assert not mark.exists()


def test_a_truncated_weight_file_is_named(save_llama, refusal):
    folder, _ = save_llama()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(ModelError, load_model, folder)
    assert str(path) in message and "download or save it again" in message


def test_a_missing_shard_is_named(save_llama, refusal):
    folder, _ = save_llama(max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(ModelError, load_model, folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_a_broken_index_is_named(save_llama, refusal, content):
    folder, _ = save_llama(max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(ModelError, load_model, folder)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no model.safetensors"),
        ("tokenizer.json", "--tokenizer"),
    ],
)
def test_a_missing_file_is_named_with_what_to_do(save_llama, refusal, file, expected):
    folder, _ = save_llama()
    (folder / file).unlink()
    message = refusal(ModelError, load_model, folder)
    assert expected in message and str(folder) in message


@pytest.mark.parametrize("content", ["not json", "[1]", "{}"])
def test_a_config_that_is_none_is_refused(save_llama, refusal, content):
    folder, _ = save_llama()
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in refusal(ModelError, load_model, folder)


def test_weights_that_lack_a_tensor_are_refused_not_filled_with_noise(save_llama, refusal):
    folder, _ = save_llama()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(ModelError, load_model, folder)


def test_weights_of_another_shape_than_the_config_says_are_refused(save_llama, refusal):
    folder, _ = save_llama()
    _edit_config(folder, intermediate_size=96)
    assert str(folder) in refusal(ModelError, load_model, folder)


def test_an_already_quantized_model_is_refused(save_llama, refusal):
    folder, _ = save_llama()
    _edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "before it was quantized" in refusal(ModelError, load_model, folder)


@pytest.mark.parametrize("load", [load_model, lambda folder: from_config(folder, torch.float32)])
def test_an_activation_that_is_unknown_is_named_with_its_field(save_llama, refusal, load):
    folder, _ = save_llama()
    _edit_config(folder, hidden_act="exec")
    assert "config.json has 'exec' for hidden_act" in refusal(ModelError, load, folder)


@pytest.mark.parametrize("method", ["zorp", 5])
def test_a_model_is_not_loaded_without_the_quantization_that_it_names(save_llama, refusal, method):
    folder, _ = save_llama()
    _edit_config(folder, quantization_config={"quant_method": method})
    said = refusal(ModelError, pretrained, folder, None)
    assert f"quantized by {method!r}" in said and "before it was quantized" in said


@pytest.mark.parametrize("load", [load_model, lambda folder: pretrained(folder, None)])
def test_integers_are_not_taken_for_weights(save_llama, refusal, load):
    folder, _ = save_llama()
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name].view(torch.int16)
    save_file(tensors, path, metadata={"format": "pt"})
    assert f"has integers for {name}" in refusal(ModelError, load, folder)


def test_weights_of_another_model_than_the_configuration_names_are_refused(save_llama, refusal):
    folder, _ = save_llama()
    _edit_config(folder, model_type="vit", architectures=["ViTModel"])
    message = refusal(ModelError, load_model, folder)
    assert "lack" in message and "ViTModel" in message


def test_a_tokenizer_given_apart_stands_in_for_a_missing_one(save_llama, tmp_path):
    whole, _ = save_llama("whole")
    bare, _ = save_llama("bare", tokenizer=False)
    loaded = load_model(bare, tokenizer=str(whole / "tokenizer.json"))
    assert loaded.tokenizer("w5").input_ids == [5]
    assert loaded.source.tokenizer == str(whole / "tokenizer.json")


def test_a_broken_tokenizer_is_named(save_llama, refusal):
    folder, _ = save_llama()
    (folder / "tokenizer.json").write_text("{")
    assert str(folder) in refusal(ModelError, load_model, folder)


@pytest.mark.parametrize(
    "name",
    ["missing/place/model", "./model", "/nowhere/model", "weights.pt", "weights.safetensors"],
)
def test_a_path_that_is_not_there_is_refused(refusal, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert f"no model at {name}" in refusal(ModelError, load_model, name)


def test_a_name_that_can_be_neither_found_nor_fetched_is_refused(refusal, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(ModelError, load_model, "some-org/some-model")
    assert message.startswith("some-org/some-model is neither a folder here nor")


def test_a_model_of_the_hub_is_loaded_from_its_cache(save_llama, tmp_path, monkeypatch):
    import huggingface_hub.constants

    folder, _ = save_llama()
    repository = tmp_path / "cache" / "models--some-org--some-model"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    loaded = load_model("some-org/some-model")
    assert loaded.source.path == "some-org/some-model"
    assert loaded.content_hash == load_model(folder).content_hash


def test_an_empty_folder_and_one_that_holds_something_else_are_refused(tmp_path, refusal):
    assert "is empty" in refusal(ModelError, load_model, tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "no config.json" in refusal(ModelError, load_model, tmp_path)
    (tmp_path / "weights.pt").write_text("x")
    assert str(tmp_path / "weights.pt") in refusal(ModelError, load_model, tmp_path)


def test_the_weights_of_a_folder_go_into_the_module_of_a_factory(save_llama, factory, tmp_path):
    folder, model = save_llama(max_shard_size="20KB")
    spec = factory(f"""
from transformers import AutoConfig, AutoModelForCausalLM

def build():
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained({str(folder)!r}))
""")
    loaded = load_model(folder, model_factory=spec)
    assert (loaded.source.kind, loaded.source.path) == ("state_dict", str(folder))
    assert torch.equal(loaded.module(IDS).logits, model(IDS).logits)
    assert loaded.tokenizer("w1").input_ids == [1]


def test_a_wrong_device_or_dtype_is_refused_before_anything_is_read(tmp_path, refusal):
    refusal(DeviceError, load_model, tmp_path / "missing", device="tpu")
    refusal(WorkloadError, load_model, tmp_path / "missing", dtype="int3")
