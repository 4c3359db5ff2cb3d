"""A model is moved to its device, by several threads where the device is quicker with them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Perceptron, tiny_llama

from autoquant.errors import ModelError
from autoquant.models import placing


class Elsewhere:
    """Stands in for a device with memory of its own: what is uploaded is a copy."""

    type = "elsewhere"
    upload_threads = 3

    def __init__(self):
        self.uploaded = []

    def free_bytes(self):
        return 1 << 20

    def upload(self, tensor):
        if tensor.shape == (1,):
            raise torch.OutOfMemoryError("no room")
        self.uploaded.append(tensor.data_ptr())
        return tensor.clone()


@pytest.fixture
def elsewhere(monkeypatch):
    place = Elsewhere()
    monkeypatch.setattr(placing, "backend", lambda _device: place)
    return place


def test_each_parameter_is_uploaded_once_and_tied_ones_stay_tied(elsewhere):
    model = tiny_llama(tied=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        logits = model(ids).logits
    assert placing.moved(model, "cpu") is model
    assert len(elsewhere.uploaded) == len(set(elsewhere.uploaded)) == len(list(model.parameters()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_what_a_thread_cannot_upload_is_an_error(elsewhere):
    module = Perceptron()
    module.small = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        placing.moved(module, "cpu")


def test_what_does_not_fit_is_refused_before_it_is_moved(elsewhere):
    with pytest.raises(
        ModelError, match=r"takes 4 MiB, and cpu has 1 MiB of memory free: free some"
    ):
        placing.moved(torch.nn.Linear(1024, 1024, bias=False), "cpu")
    assert not elsewhere.uploaded


def test_a_cpu_leaves_parameters_where_they_are():
    module = Perceptron()
    before = [parameter.data_ptr() for parameter in module.parameters()]
    placing.moved(module, "cpu")
    assert [parameter.data_ptr() for parameter in module.parameters()] == before
