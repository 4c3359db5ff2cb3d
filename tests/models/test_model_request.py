"""What is asked of loading, checked before any weights are read, and asked again by another process."""

import pickle

import pytest
import torch
from tiny_models import Perceptron, tiny_llama, tiny_tokenizer
from torch import nn

from autoquant.errors import DeviceError, ModelError, WorkloadError
from autoquant.models import ModelRequest, SameModel, from_module, load_model, load_request
from autoquant.models.outputs import run_on_tokens


def test_auto_is_a_device_once_the_request_is_made():
    assert ModelRequest(model="model").device in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"device": "tpu"}, DeviceError),
        ({"dtype": "int3"}, WorkloadError),
        ({"tokenizer": object()}, ModelError),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_the_model_is_looked_for(
    refusal, options, error
):
    refusal(error, ModelRequest, model="/no/such/model", **options)


def test_a_live_module_may_come_with_its_tokenizer():
    loaded = load_request(
        ModelRequest(model=tiny_llama(), device="cpu", tokenizer=tiny_tokenizer())
    )
    assert (loaded.source.kind, loaded.kind) == ("live", "causal_lm")


@pytest.mark.parametrize("inputs", [[torch.ones(2, 8)], {"x": torch.ones(2, 8)}])
def test_inputs_are_kept_as_arguments(inputs):
    loaded = from_module(Perceptron(), sample_inputs=inputs)
    assert type(loaded.example_inputs) is (dict if isinstance(inputs, dict) else tuple)


def test_another_process_loads_the_same_model(save_llama):
    folder, _ = save_llama()
    loaded = load_model(folder, dtype="fp32")
    again = pickle.loads(pickle.dumps(SameModel.of(loaded))).load()
    assert (again.content_hash, again.dtype, again.kind) == (
        loaded.content_hash,
        "float32",
        loaded.kind,
    )
    assert again.source == loaded.source


def test_another_process_has_the_inputs_that_the_user_gave(tmp_path):
    x = torch.ones(2, 8)
    module = Perceptron().eval()
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(2, 8),)), path)
    same = SameModel.of(load_model(path, sample_inputs=(x,)))
    assert torch.equal(same.load().example_inputs[0], x)


def test_another_process_refuses_a_model_that_was_changed(save_llama, refusal):
    folder, _ = save_llama()
    same = SameModel.of(load_model(folder))
    tiny_llama(seed=1).save_pretrained(folder)
    assert "was changed while it was searched" in refusal(ModelError, same.load)


def test_a_module_with_a_generate_of_its_own_is_called_with_token_ids_only():
    class Own(nn.Module):
        def forward(self, ids):
            return ids.float()

        def generate(self):
            raise NotImplementedError

    assert run_on_tokens(Own(), torch.ones(1, 3, dtype=torch.long)).shape == (1, 3)
