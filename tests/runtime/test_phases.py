"""Running the phases of a workload."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models.tiny_models import Perceptron, as_loaded, tiny_llama
from torch import nn

from autoquant.devices.cpu import CpuBackend
from autoquant.errors import WorkloadError
from autoquant.models.outputs import output_tensor
from autoquant.records import Workload
from autoquant.runtime.phases import check_room, make_phases


def causal(module, workload, batch=1, **rest):
    return make_phases(as_loaded(module, **rest), Workload.parse(workload, batch))


def full_logits(module, phases, tokens):
    with torch.no_grad():
        return module(phases._ids[:, :tokens], use_cache=False).logits


@pytest.mark.parametrize("batch", [1, 2])
def test_a_decode_step_gives_the_logits_of_a_full_forward_pass(batch):
    module = tiny_llama(dtype=torch.float32)
    phases = causal(module, "prefill=7,decode=4", batch)
    full = full_logits(module, phases, 11)
    for _ in range(2):  # a reset starts over
        phases.reset("decode")
        assert phases.limit("decode") == 4
        for position in range(7, 11):
            logits = phases.run("decode")
            torch.testing.assert_close(logits[:, -1], full[:, position], rtol=1e-4, atol=1e-5)
        phases.reset("prefill")
        torch.testing.assert_close(phases.run("prefill")[:, -1], full[:, 6], rtol=1e-4, atol=1e-5)
    assert phases.limit("prefill") == 1


def test_decoding_alone_starts_from_one_token():
    module = tiny_llama(dtype=torch.float32)
    phases = causal(module, "decode=3")
    phases.reset("decode")
    first = phases.run("decode")
    torch.testing.assert_close(
        first[:, -1], full_logits(module, phases, 2)[:, -1], rtol=1e-4, atol=1e-5
    )


def test_the_same_tokens_are_run_for_every_model():
    first, second = (causal(tiny_llama(seed=seed), "prefill=9,decode=2", 2) for seed in (0, 1))
    assert torch.equal(first._ids, second._ids) and first._ids.shape == (2, 11)
    assert first._ids.unique().numel() > 5


@pytest.mark.parametrize(
    ("workload", "fits"),
    [
        ("prefill=100,decode=28", True),
        ("prefill=100,decode=29", False),
        ("prefill=129", False),
        ("prefill=128", True),
        ("decode=127", True),
        ("decode=128", False),  # the first step needs a token before it
    ],
)
def test_a_workload_that_needs_more_positions_than_the_model_has_is_refused(workload, fits):
    module = tiny_llama()
    if fits:
        assert causal(module, workload, max_positions=128)._ids.shape[1] <= 128
    else:
        with pytest.raises(WorkloadError, match="the model has 128"):
            causal(module, workload, max_positions=128)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_a_model_without_a_cache_is_prefilled():
    phases = make_phases(as_loaded(Tokens(), "token_lm"), Workload.parse("prefill=5", 3))
    phases.reset("prefill")
    assert phases.run("prefill").shape == (3, 5, 16)
    assert phases.limit("prefill") > 1000


@pytest.mark.parametrize("workload", ["decode=5", "prefill=5,decode=5"])
def test_a_model_without_a_cache_cannot_decode(workload):
    with pytest.raises(WorkloadError, match="no decode phase"):
        make_phases(as_loaded(Tokens(), "token_lm"), Workload.parse(workload))


@pytest.mark.parametrize(
    "inputs", [(torch.ones(2, 8),), [torch.ones(2, 8)], {"x": torch.ones(2, 8)}]
)
def test_a_module_runs_on_its_sample_inputs(inputs):
    module = Perceptron().eval()
    phases = make_phases(as_loaded(module, "module", inputs), Workload.single())
    phases.reset("forward")
    y = phases.run("forward")
    assert torch.equal(y, module(torch.ones(2, 8))) and not y.requires_grad


def test_a_module_without_sample_inputs_is_refused():
    with pytest.raises(WorkloadError, match="sample_inputs"):
        make_phases(as_loaded(Perceptron(), "module"), Workload.single())


def test_the_tensor_of_an_output_is_found():
    tensor, other = torch.ones(1), torch.zeros(1)
    for output in (
        tensor,
        (tensor, other),
        [[tensor]],
        {"logits": tensor, "x": other},
        SimpleNamespace(logits=tensor),
    ):
        assert output_tensor(output) is tensor
    with pytest.raises(WorkloadError, match="the model returns NoneType"):
        output_tensor(None)


@pytest.mark.parametrize(("batch", "fits"), [(20, True), (21, False)])
def test_a_batch_is_refused_whose_ids_and_scores_alone_take_more_than_there_is(
    monkeypatch, batch, fits
):
    of_one = 11 * 8 + 64 * 2
    monkeypatch.setattr(CpuBackend, "room_bytes", lambda _backend: 20 * of_one)
    loaded = replace(as_loaded(tiny_llama()), vocabulary=64)
    workload = Workload.parse("prefill=7,decode=4", batch)
    if fits:
        return check_room(loaded, workload)
    with pytest.raises(WorkloadError, match=r"batch=21 does not fit .* of cpu: lower --batch"):
        check_room(loaded, workload)
