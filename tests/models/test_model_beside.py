"""Weights that were saved by hand beside a config.json, under whatever names a training program gave them."""

import json

import pytest
import torch
from tiny_models import Payload, tiny_llama

from autoquant.errors import ModelError
from autoquant.models import load_model

IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture
def by_hand(save_llama):
    """Save a tiny Llama's weights by hand beside its config.json and return (file, model)."""

    def save(change=dict, *, file="model.pt", wrap=lambda state: state, **options):
        folder, model = save_llama("by-hand", **options)
        (folder / "model.safetensors").unlink()
        torch.save(wrap(change(model.state_dict())), folder / file)
        return folder / file, model

    return save


def prefixed(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


def lacking(part):
    return lambda state: {name: value for name, value in state.items() if part not in name}


NAMES = {
    "as they are": dict,
    "of DataParallel": prefixed("module."),
    "of torch.compile": prefixed("_orig_mod."),
    "of torch.compile around DataParallel": prefixed("_orig_mod.module."),
    "of DataParallel around torch.compile": prefixed("module._orig_mod."),
    "of a trainer that holds the model": prefixed("model."),
    "of a trainer that holds the model compiled": prefixed("model._orig_mod."),
    "of a trainer with a name of its own": prefixed("student.net."),
    "without the base's prefix": lambda state: {
        name.removeprefix("model."): value for name, value in state.items()
    },
    "of compiled layers": lambda state: {
        name.replace("layers.1.", "layers.1._orig_mod."): value for name, value in state.items()
    },
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", NAMES.values(), ids=NAMES.keys())
def test_weights_under_any_prefix_are_the_model_that_the_config_describes(by_hand, change, tied):
    path, model = by_hand(change, tied=tied)
    loaded = load_model(path)
    assert (loaded.kind, loaded.max_positions, loaded.stored_dtype) == (
        "causal_lm",
        128,
        "bfloat16",
    )
    assert (loaded.source.kind, loaded.source.path, loaded.notes) == ("huggingface", str(path), ())
    assert loaded.tokenizer("w1 w2").input_ids == [1, 2]
    assert not loaded.module.training and not any(
        p.requires_grad for p in loaded.module.parameters()
    )
    assert torch.equal(loaded.module(IDS).logits, model(IDS).logits)
    assert (loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_weights_inside_a_training_checkpoint_are_found(by_hand, key):
    path, model = by_hand(wrap=lambda state: {"epoch": 3, key: state}, file="last.ckpt")
    assert torch.equal(load_model(path).module(IDS).logits, model(IDS).logits)


def test_a_safetensors_file_beside_a_config_is_loaded_too(save_llama):
    folder, model = save_llama()
    loaded = load_model(folder / "model.safetensors")
    assert torch.equal(loaded.module(IDS).logits, model(IDS).logits)


def test_it_is_the_same_model_as_its_folder(by_hand, save_llama):
    path, _ = by_hand(prefixed("_orig_mod."), tied=True)
    folder, _ = save_llama("folder", tied=True)
    assert load_model(path).content_hash == load_model(folder).content_hash
    assert load_model(path, dtype="fp32").content_hash == load_model(folder).content_hash


@pytest.mark.parametrize("absent", ["lm_head", "embed_tokens"])
def test_of_tied_weights_one_may_be_absent(by_hand, absent):
    path, model = by_hand(lacking(absent), tied=True)
    loaded = load_model(path)
    assert torch.equal(loaded.module(IDS).logits, model(IDS).logits)
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight


def test_tied_weights_that_differ_in_the_file_are_refused(by_hand, refusal):
    path, _ = by_hand(lambda state: state | {"lm_head.weight": torch.zeros(64, 32)}, tied=True)
    message = refusal(ModelError, load_model, path)
    assert "lm_head.weight" in message and "tie_word_embeddings" in message


def test_buffers_of_old_checkpoints_are_left_out_with_the_reason(by_hand):
    old = {
        f"model.layers.{number}.self_attn.rotary_emb.inv_freq": torch.ones(4) for number in range(2)
    }
    path, model = by_hand(lambda state: state | old)
    loaded = load_model(path)
    assert torch.equal(loaded.module(IDS).logits, model(IDS).logits)
    [note] = loaded.notes
    assert "rotary_emb.inv_freq" in note and "computes these itself" in note


def test_masks_of_old_checkpoints_are_left_out_and_a_bias_is_not(tmp_path, refusal):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32,
        n_layer=1,
        n_head=2,
        vocab_size=64,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config).eval()
    config.save_pretrained(tmp_path)
    from tiny_models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    torch.save(model.state_dict() | masks, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    # Its linears are turned, which adds up in another order.
    assert torch.allclose(loaded.module(IDS).logits, model(IDS).logits, atol=1e-5)
    assert "attn.bias" in loaded.notes[0] and "attn.masked_bias" in loaded.notes[0]
    torch.save(
        model.state_dict() | {"transformer.h.0.attention.bias": torch.ones(32)},
        tmp_path / "model.pt",
    )
    assert "attention.bias" in refusal(ModelError, load_model, tmp_path / "model.pt")


def test_weights_that_the_model_lacks_or_has_too_many_of_are_named(by_hand, refusal):
    message = refusal(ModelError, load_model, by_hand(lacking("up_proj"))[0])
    assert "lack model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight" in message
    message = refusal(
        ModelError, load_model, by_hand(lambda state: state | {"extra.weight": torch.ones(2)})[0]
    )
    assert "has extra.weight" in message and "--model-factory" in message


def test_weights_of_another_module_beside_the_config_need_a_factory(by_hand, refusal):
    path, _ = by_hand(lambda _: torch.nn.Linear(4, 4).state_dict())
    message = refusal(ModelError, load_model, path)
    assert "none of the weights of LlamaForCausalLM" in message and "--model-factory" in message


def test_a_weight_of_another_shape_is_named_with_both_shapes(by_hand, refusal):
    wrong = {"model.layers.1.mlp.up_proj.weight": torch.ones(9, 32)}
    message = refusal(ModelError, load_model, by_hand(lambda state: state | wrong)[0])
    assert "model.layers.1.mlp.up_proj.weight of [9, 32]" in message and "[64, 32]" in message


def test_the_tokenizer_may_be_elsewhere_and_is_asked_for(by_hand, save_llama, refusal):
    path, _ = by_hand(tokenizer=False)
    assert "--tokenizer" in refusal(ModelError, load_model, path)
    whole, _ = save_llama("whole")
    assert load_model(path, tokenizer=str(whole)).tokenizer("w5").input_ids == [5]


def test_a_config_of_no_known_kind_is_refused_by_name(by_hand, refusal):
    path, _ = by_hand()
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(
        json.dumps(config | {"model_type": "bert", "architectures": ["BertForMultipleChoice"]})
    )
    message = refusal(ModelError, load_model, path)
    assert "BertForMultipleChoice" in message and "config.json" in message
    assert "--quality" in message


def test_a_config_json_of_something_else_does_not_count(by_hand, refusal):
    path, _ = by_hand()
    (path.parent / "config.json").write_text('{"learning_rate": 1}')
    assert "--model-factory" in refusal(ModelError, load_model, path)


def test_code_beside_the_weights_is_not_run(by_hand, tmp_path, refusal):
    path, _ = by_hand()
    mark = tmp_path / "ran"
    (path.parent / "modeling_own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    config = json.loads((path.parent / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (path.parent / "config.json").write_text(
        json.dumps(config | {"model_type": "own", "auto_map": classes})
    )
    refusal(ModelError, load_model, path)
    assert not mark.exists()


def test_how_the_folder_says_to_generate_is_kept(by_hand):
    path, _ = by_hand()
    (path.parent / "generation_config.json").write_text(
        '{"eos_token_id": 7, "top_k": 3, "do_sample": true}'
    )
    config = load_model(path).module.generation_config
    assert (config.eos_token_id, config.top_k) == (7, 3)


# -- pytorch_model.bin ---------------------------------------------------------------------------------------------------


def save_bins(folder, model, shards=1):
    (folder / "model.safetensors").unlink()
    state = dict(model.state_dict())
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    files = {
        name: f"pytorch_model-{number % shards + 1:05}-of-{shards:05}.bin"
        for number, name in enumerate(names)
    }
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_with_pickled_tensors_is_loaded_and_is_the_same_model(save_llama, shards, tied):
    folder, model = save_llama(tied=tied)
    expected = load_model(folder).content_hash
    save_bins(folder, model, shards)
    loaded = load_model(folder)
    assert torch.equal(loaded.module(IDS).logits, model(IDS).logits)
    assert (loaded.content_hash, loaded.source.path) == (expected, str(folder))


def test_weights_in_a_folder_that_its_model_has_no_place_for_are_refused(save_llama, refusal):
    folder, model = save_llama()
    save_bins(folder, model)
    torch.save(
        dict(model.state_dict()) | {"extra.weight": torch.ones(2)}, folder / "pytorch_model.bin"
    )
    message = refusal(ModelError, load_model, folder)
    assert "extra.weight" in message and "LlamaForCausalLM" in message and "--quality" in message


def test_a_missing_or_damaged_shard_is_named(save_llama, refusal):
    folder, model = save_llama()
    save_bins(folder, model, 3)
    shard = folder / "pytorch_model-00002-of-00003.bin"
    shard.write_bytes(shard.read_bytes()[:-300])
    assert shard.name in refusal(ModelError, load_model, folder)
    shard.unlink()
    assert shard.name in refusal(ModelError, load_model, folder)


@pytest.mark.parametrize("trust", [False, True])
def test_code_in_a_pickled_shard_is_never_run(save_llama, tmp_path, refusal, trust):
    folder, model = save_llama()
    save_bins(folder, model)
    torch.save(
        dict(model.state_dict()) | {"p": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin"
    )
    assert "pickled code" in refusal(ModelError, load_model, folder, trust_pickle=trust)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_lacks_weights_and_tokenizer_is_told_both(save_llama, refusal):
    folder, _ = save_llama(tokenizer=False)
    (folder / "model.safetensors").unlink()
    message = refusal(ModelError, load_model, folder)
    assert "no model.safetensors and no tokenizer.json" in message and "--tokenizer" in message


def test_a_folder_with_weights_saved_by_hand_names_the_file_to_give(by_hand, refusal):
    path, _ = by_hand(prefixed("module."))
    assert f"give the file of weights itself, {path}" in refusal(
        ModelError, load_model, path.parent
    )


def test_a_factory_takes_weights_with_prefixes_too(tmp_path, factory):
    model = tiny_llama()
    spec = factory(
        "def build():\n    from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"    return LlamaForCausalLM(LlamaConfig.from_dict({model.config.to_dict()!r}))\n"
    )
    hashes = set()
    for prefix in ("", "_orig_mod.", "module."):
        torch.save(prefixed(prefix)(model.state_dict()), tmp_path / "a.pt")
        loaded = load_model(tmp_path / "a.pt", model_factory=spec)
        assert torch.equal(loaded.module(IDS).logits, model(IDS).logits)
        hashes.add(loaded.content_hash)
    assert len(hashes) == 1
