"""Weights rounded for what layers read.

From the right inputs, made once, shared, and the same every time.
"""

import os

import pytest
import torch
from end_to_end.tiny import make_llama
from torch import nn

from autoquant.candidates import InputStatistics, get_format
from autoquant.delivery import rounding_inputs as calibration_module
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.errors import CandidateError

GPTQ, CLIP = get_format("int3-g32-gptq/bit-planes"), get_format("int3-g32-clip/bit-planes")
WINDOWS = torch.randint(0, 120, (5, 48), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def llama():
    return make_llama().requires_grad_(False)


def linears(module):
    return [
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    ]


def read_by(module, layer):
    """All rows that a layer reads."""
    rows = []
    handle = module.get_submodule(layer).register_forward_pre_hook(
        lambda _module, args: rows.append(args[0].reshape(-1, args[0].shape[-1]).float())
    )
    with torch.no_grad():
        for ids in WINDOWS:
            module(ids.unsqueeze(0))
    handle.remove()
    return torch.cat(rows)


def same(first, second):
    return torch.equal(first.planes, second.planes) and torch.equal(first.scale, second.scale)


@pytest.mark.parametrize(
    "layer", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
)
def test_a_weight_is_rounded_for_what_its_layer_reads_in_the_unquantized_model(llama, layer):
    made = Calibration(WINDOWS)
    assert made.prepare(llama, {name: [GPTQ] for name in linears(llama)}) == {}
    x = read_by(llama, layer)
    weight = llama.get_submodule(layer).weight
    stored = made.stored(f"{layer}.weight", GPTQ)

    def error(stored):
        return ((GPTQ.dequantize(stored) - weight.float()) @ x.t()).norm().item()

    assert error(stored) == pytest.approx(
        error(GPTQ.store(weight, InputStatistics(x.t() @ x))), rel=0.02
    )
    assert error(stored) < 0.9 * error(get_format("int3-g32/bit-planes").store(weight))


def test_the_head_that_shares_the_embeddings_weight_is_rounded_too(llama):
    made = Calibration(WINDOWS)
    assert made.prepare(llama, {"model.embed_tokens.weight": [CLIP]}) == {}
    assert made.stored("model.embed_tokens.weight", CLIP).shape == llama.lm_head.weight.shape


def test_layers_that_read_the_same_input_share_its_hessian(llama, monkeypatch):
    factored = []
    monkeypatch.setattr(
        InputStatistics,
        "inverse_factor",
        property(lambda self: factored.append(self) or torch.eye(len(self.hessian))),
    )
    Calibration(WINDOWS).prepare(llama, {name: [GPTQ] for name in linears(llama)})
    assert (
        len(factored) == 14 and len(set(map(id, factored))) == 8
    )  # q, k, v and gate, up of two blocks


def test_only_one_blocks_hessians_are_held_at_a_time(llama, monkeypatch):
    held = []
    statistics = calibration_module._InputSums.statistics
    monkeypatch.setattr(
        calibration_module._InputSums,
        "statistics",
        lambda self: held.append(self._sums) or statistics(self),
    )
    Calibration(WINDOWS).prepare(llama, {name: [GPTQ] for name in linears(llama)})
    assert [len(sums) for sums in held] == [7, 7]


def test_what_was_made_is_not_made_again_and_another_process_finds_it(llama):
    made = Calibration(WINDOWS)
    names = linears(llama)[:2]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(
            1
        )  # a forked process has none of its parent's threads, and would wait for them
        failed = 1
        try:
            made.prepare(llama, {name: [GPTQ] for name in names})
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitpid(child, 0)[1] == 0
    nothing = nn.Module()  # has no parameters, so that nothing could be made from it
    assert made.prepare(nothing, {name: [GPTQ] for name in names}) == {}
    assert made.stored(names[0], GPTQ).shape == llama.get_parameter(names[0]).shape


def test_a_process_that_ended_while_it_wrote_does_no_harm(llama):
    made = Calibration(WINDOWS)
    first, second = linears(llama)[:2]
    made.prepare(llama, {first: [GPTQ]})
    whole = made.stored(first, GPTQ)
    os.pwrite(
        made._kept._file.fileno(), made._kept._SIZES.pack(30, 1 << 20) + b"half", made._kept._end
    )
    made.prepare(llama, {second: [GPTQ]})
    assert same(made.stored(first, GPTQ), whole) and made.stored(second, GPTQ) is not None


def test_the_same_text_gives_the_same_bits(llama):
    first, second = Calibration(WINDOWS), Calibration(WINDOWS.tolist())
    names = linears(llama)
    for made in (first, second):
        made.prepare(llama, {name: [GPTQ] for name in names})
    assert all(same(first.stored(name, GPTQ), second.stored(name, GPTQ)) for name in names)


class Unused(nn.Module):
    """No list of blocks, and a linear that nothing goes through."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(120, 64)
        self.used, self.unused = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, ids):
        return self.used(self.embed(ids))


def test_a_layer_that_the_text_does_not_reach_has_a_reason():
    module = Unused().requires_grad_(False)
    made = Calibration(WINDOWS)
    reasons = made.prepare(module, {"used.weight": [GPTQ], "unused.weight": [GPTQ]})
    assert reasons == {("unused.weight", GPTQ.id): "the calibration text does not reach the layer"}
    assert made.stored("used.weight", GPTQ).shape == (32, 64)
    with pytest.raises(CandidateError, match=r"unused.weight cannot be int3-g32-gptq/bit-planes"):
        made.stored("unused.weight", GPTQ)


def test_the_model_is_left_as_it_was(llama):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in llama.modules()]
    Calibration(WINDOWS).prepare(llama, {name: [GPTQ] for name in linears(llama)})
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    assert hooks == [len(module._forward_hooks) for module in llama.modules()]
    assert not any("forward" in vars(module) for module in llama.modules())
