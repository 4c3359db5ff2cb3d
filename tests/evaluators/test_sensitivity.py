"""Isolated losses against brute force: a copy of the model with one weight really replaced."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models.tiny_models import Perceptron, as_loaded, tiny_llama
from torch import nn

from autoquant.candidates import A8_ROW, A16, Format, Kernel, get_format
from autoquant.evaluators.quality import FunctionQuality, TextQuality
from autoquant.evaluators.sensitivity import SENSITIVITIES, Change
from autoquant.evaluators.text import TextParts
from autoquant.profiler.record import record
from autoquant.records import Workload
from autoquant.runtime.phases import make_phases


def coarse(weight):
    step = weight.float().abs().amax(1, keepdim=True) / 3
    return ((weight.float() / step).round() * step).to(weight.dtype)


COARSE = Format(
    id="coarse/plain",
    quantize=coarse,
    dequantize=lambda stored: stored.float(),
    kernels=(Kernel(id="matmul", numerics=A16, linear=F.linear),),
)
INT8 = get_format("int8-row/plain")
SAME = get_format("bfloat16/plain")
HOW = {
    "coarse:a16": (COARSE, A16),
    "int8-row:a16": (INT8, A16),
    "int8-row:a8-row": (INT8, A8_ROW),
    "bfloat16:a16": (SAME, A16),
    "bfloat16:a8-row": (SAME, A8_ROW),
}


def lively_llama(**kwargs):
    """Weights so large that what one layer does shows in the logits."""
    module = tiny_llama(**kwargs)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return module.requires_grad_(False)


def sites_of(module):
    phases = make_phases(as_loaded(module), Workload.parse("prefill=4"))
    return {site.name: site for site in record(module, phases).sites}


def losses_of(module, sites, quality, how=HOW):
    found, order = {}, []

    def on_scored(name, losses):
        order.append(name)
        found.update(losses)

    changes = [
        Change(site=site, numerics=numerics, format=fmt, activation=activation)
        for site in sites
        for numerics, (fmt, activation) in how.items()
    ]
    SENSITIVITIES["isolated"].score(module, changes, quality, on_scored)
    assert order == [site.name for site in sites]
    return found


def rounded_rows(_module, args):
    (x,) = args
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return ((x / scale).round().clamp(-127, 127) * scale,)


def brute_force(module, site, fmt, activation, quality, mean_divergence):
    changed = copy.deepcopy(module).float()
    for name in site.parameters:
        owner = name.removesuffix(".weight")
        linear = changed.get_submodule(owner)
        original = module.get_submodule(owner).weight
        linear.weight = nn.Parameter(
            fmt.dequantize(fmt.store(original)).float(), requires_grad=False
        )
        if activation == A8_ROW:
            linear.register_forward_pre_hook(rounded_rows)
    reference = copy.deepcopy(module).float()
    windows = quality.parts.windows["calibration"]
    with torch.no_grad():
        return mean_divergence(reference(windows).logits, changed(windows).logits)


SITES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
]


@pytest.mark.parametrize("tied", [True, False])
def test_isolated_losses_are_those_of_brute_force(quality, mean_divergence, tied):
    module = lively_llama(tied=tied)
    sites = sites_of(module)
    assert bool(sites["lm_head"].kept) == tied
    found = losses_of(module, [sites[name] for name in SITES], quality)
    assert set(found) == {(name, numerics) for name in SITES for numerics in HOW}
    for name in SITES:
        for numerics, (fmt, activation) in HOW.items():
            expected = brute_force(module, sites[name], fmt, activation, quality, mean_divergence)
            assert found[name, numerics] == pytest.approx(expected, rel=2e-2, abs=1e-7), (
                name,
                numerics,
            )
        assert found[name, "bfloat16:a16"] == 0.0
        assert found[name, "coarse:a16"] > 100 * found[name, "int8-row:a16"] > 1e-5
        assert found[name, "int8-row:a8-row"] > found[name, "int8-row:a16"]
        assert found[name, "bfloat16:a8-row"] > 0


def test_a_weight_shared_by_two_layers_is_changed_in_both(quality, mean_divergence):
    module = lively_llama()
    layers = module.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    site = sites_of(module)["model.layers.0.mlp.up_proj"]
    assert len(site.parameters) == 2
    found = losses_of(module, [site], quality)
    for numerics in ("coarse:a16", "int8-row:a8-row"):
        expected = brute_force(module, site, *HOW[numerics], quality, mean_divergence)
        assert found[site.name, numerics] == pytest.approx(expected, rel=2e-2)


def test_scoring_leaves_the_model_as_it_was(quality):
    module = lively_llama(tied=True)
    before = {
        name: (id(p), p.detach().clone())
        for name, p in module.named_parameters(remove_duplicate=False)
    }
    losses_of(
        module, list(sites_of(module).values())[:2], quality, {"coarse:a16": HOW["coarse:a16"]}
    )
    for name, parameter in module.named_parameters(remove_duplicate=False):
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.dtype == torch.bfloat16
    assert not any(child._forward_hooks or "forward" in vars(child) for child in module.modules())


def test_blocks_before_the_changed_one_are_not_run_again(quality):
    module = lively_llama()
    sites = sites_of(module)
    runs = {0: 0, 1: 0}
    for index in runs:
        module.model.layers[index].mlp.register_forward_hook(
            lambda *_args, index=index: runs.__setitem__(index, runs[index] + 1)
        )
    how = {"coarse:a16": HOW["coarse:a16"], "int8-row:a8-row": HOW["int8-row:a8-row"]}
    losses_of(module, [sites["model.layers.1.mlp.up_proj"], sites["lm_head"]], quality, how)
    windows = len(quality.parts.windows["calibration"])
    assert runs[0] <= 1 + windows  # to find the blocks, and to run each window once
    assert runs[1] <= 1 + windows + 2 * windows


def test_a_change_that_changes_nothing_is_not_run(quality):
    module = lively_llama()
    site = sites_of(module)["model.layers.0.mlp.up_proj"]
    runs = []
    module.model.layers[0].mlp.register_forward_hook(lambda *_args: runs.append(1))
    found = losses_of(module, [site], quality, {"bfloat16:a16": HOW["bfloat16:a16"]})
    assert found == {(site.name, "bfloat16:a16"): 0.0}
    assert len(runs) <= 1 + len(quality.parts.windows["calibration"])


def test_weights_too_large_to_keep_give_the_same_losses(quality, monkeypatch):
    from autoquant.evaluators.sensitivity import weights

    module = lively_llama()
    sites = list(sites_of(module).values())[:3]
    kept = losses_of(module, sites, quality)
    monkeypatch.setattr(weights, "KEPT_BYTES", 0)
    assert losses_of(module, sites, quality) == kept


def test_only_the_calibration_part_is_looked_at(quality):
    module = lively_llama()
    sites = [sites_of(module)["lm_head"]]
    nothing = torch.empty(0, 20, dtype=torch.long)
    other = TextParts(dict(quality.parts.windows) | {"selection": nothing, "report": nothing})
    assert losses_of(module, sites, TextQuality(other, "cpu")) == losses_of(module, sites, quality)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_function_of_the_users_own_scores_the_increase_of_its_mean(dtype):
    torch.manual_seed(3)
    module = Perceptron().to(dtype).eval().requires_grad_(False)
    x = torch.randn(16, 8).to(dtype)
    target = module(x).float() + torch.randn(16, 4) * 0.1
    parts = []

    def mean_square(model, part):
        parts.append(part)
        return (model(x).float() - target).square().mean(-1)

    phases = make_phases(as_loaded(module, "module", (x,)), Workload.single())
    sites = {site.name: site for site in record(module, phases).sites}
    found = losses_of(module, list(sites.values()), FunctionQuality(mean_square, "own"))
    assert set(parts) == {"calibration"}
    base = mean_square(module, "calibration").mean().item()
    for name, site in sites.items():
        changed = copy.deepcopy(module)
        linear = changed.get_submodule(name)
        linear.weight = nn.Parameter(coarse(linear.weight), requires_grad=False)
        expected = max(mean_square(changed, "calibration").mean().item() - base, 0.0)
        assert expected > 0 and found[site.name, "coarse:a16"] == pytest.approx(expected, rel=1e-3)
        changed = copy.deepcopy(module)
        changed.get_submodule(name).register_forward_pre_hook(
            lambda module, args: (rounded_rows(module, (args[0].float(),))[0].to(dtype),)
        )
        expected = max(mean_square(changed, "calibration").mean().item() - base, 0.0)
        if dtype == torch.float32:
            assert found[site.name, "bfloat16:a8-row"] >= 0.0
        else:
            assert found[site.name, "bfloat16:a8-row"] == pytest.approx(
                expected, rel=1e-3, abs=1e-9
            )
            assert found[site.name, "bfloat16:a16"] == 0.0
    assert all(loss >= 0 for loss in found.values())
