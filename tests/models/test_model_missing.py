"""A file that needs something else is refused once, with all that it needs in the order to give it."""

import pickle
import shlex
import sys
from collections import OrderedDict

import pytest
import torch
from tiny_models import Perceptron, tiny_llama
from torch import nn

from autoquant.errors import ModelError
from autoquant.models import load_model


def options(message):
    """The options of the example in a message."""
    example = message[message.index("`autoquant search ") + 1 : message.index("`; or ")]
    return [word for word in shlex.split(example)[3:] if word.startswith("--")]


class Namespace:
    """Something that a training program keeps beside the weights."""


def test_a_state_dict_alone_of_a_language_model_needs_a_factory_and_a_tokenizer(tmp_path, refusal):
    torch.save(tiny_llama().state_dict(), tmp_path / "my model.pt")
    message = refusal(ModelError, load_model, tmp_path / "my model.pt")
    assert options(message) == ["--model-factory", "--tokenizer"]
    assert "config.json" in message and "tokenizer.json" in message
    assert shlex.quote(str(tmp_path / "my model.pt")) in message


def test_a_state_dict_alone_of_another_module_needs_a_factory_and_inputs(tmp_path, refusal):
    torch.save(Perceptron().state_dict(), tmp_path / "model.pt")
    message = refusal(ModelError, load_model, tmp_path / "model.pt")
    assert options(message) == ["--model-factory", "--sample-inputs"]
    assert "torch.export.save" in message


@pytest.mark.parametrize(
    "inputs", ["my_code:inputs", (torch.ones(2, 8),), {"x": torch.ones(2, 8)}], ids=str
)
def test_what_is_given_is_not_asked_for(tmp_path, refusal, inputs):
    torch.save(Perceptron().state_dict(), tmp_path / "model.pt")
    assert options(
        refusal(ModelError, load_model, tmp_path / "model.pt", sample_inputs=inputs)
    ) == ["--model-factory"]
    torch.save(Perceptron(), tmp_path / "model.pt")
    assert options(
        refusal(ModelError, load_model, tmp_path / "model.pt", sample_inputs=inputs)
    ) == ["--trust-pickle"]


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_pickled_module_is_named_and_needs_trust_and_inputs(tmp_path, refusal, form):
    path, module = tmp_path / "model.pt", nn.Sequential(nn.Linear(8, 8))
    if form == "pickle":
        path.write_bytes(pickle.dumps(module))
    else:
        torch.save(module, path, _use_new_zipfile_serialization=form == "zip")
    message = refusal(ModelError, load_model, path)
    assert "torch.nn.modules.container.Sequential" in message
    assert options(message) == ["--trust-pickle", "--sample-inputs"]
    assert "or for a model of token ids --tokenizer FOLDER in place of the latter" in message


def test_a_pickled_language_model_needs_trust_and_a_tokenizer(tmp_path, refusal, save_llama):
    torch.save(tiny_llama(), tmp_path / "model.pt")
    message = refusal(ModelError, load_model, tmp_path / "model.pt")
    assert "LlamaForCausalLM" in message and "--sample-inputs" not in message
    assert options(message) == ["--trust-pickle", "--tokenizer"] and "save_pretrained()" in message
    folder, _ = save_llama()
    loaded = load_model(tmp_path / "model.pt", trust_pickle=True, tokenizer=str(folder))
    assert (loaded.kind, loaded.source.kind) == ("causal_lm", "pickle")


@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_a_state_dict_with_objects_in_it_needs_trust_and_a_model(
    tmp_path, refusal, container, save_llama
):
    value = container(model=tiny_llama().state_dict(), arguments=Namespace())
    torch.save(value, tmp_path / "model.pt")
    message = refusal(ModelError, load_model, tmp_path / "model.pt")
    assert f"{__name__}.Namespace" in message
    assert options(message) == ["--trust-pickle", "--model-factory", "--sample-inputs"]
    folder, _ = save_llama()
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "model.pt")
    message = refusal(ModelError, load_model, folder / "model.pt")
    assert options(message) == ["--trust-pickle"]
    assert load_model(folder / "model.pt", trust_pickle=True).kind == "causal_lm"


def test_no_class_is_imported_to_tell_what_is_missing(tmp_path, factory, refusal):
    import importlib

    spec = factory("class Net(nn.Linear): pass\n")
    name = spec.partition(":")[0]
    sys.path.insert(0, str(tmp_path))
    torch.save(importlib.import_module(name).Net(2, 2), tmp_path / "model.pt")
    sys.path.remove(str(tmp_path))
    sys.modules.pop(name)
    assert f"{name}.Net" in refusal(ModelError, load_model, tmp_path / "model.pt")
    assert name not in sys.modules


def test_what_to_save_instead_of_torchscript_can_be_typed_as_it_stands(
    tmp_path, refusal, factory, monkeypatch
):
    module = Perceptron().eval()
    torch.jit.trace(module, torch.ones(1, 8)).save(tmp_path / "scripted.pt")
    message = refusal(ModelError, load_model, tmp_path / "scripted.pt")
    assert "torch.export.export(module, inputs)" in message
    start = message.index("torch.save(")
    monkeypatch.chdir(tmp_path)
    exec(message[start : message.index(", with --model-factory")])
    source = "import sys\ndef build():\n    from tiny_models import Perceptron\n    return Perceptron()\n"
    loaded = load_model("weights.pt", model_factory=factory(source))
    assert torch.equal(loaded.module.up.weight, module.up.weight)
