"""Fisher output and the path integral.

Against the isolated losses, against brute force, and what they leave as it was.
"""

import copy
import math

import pytest
import torch
from models.tiny_models import as_loaded
from torch import nn

from autoquant.candidates import A8_FLOAT8_TENSOR
from autoquant.devices.cpu import CpuBackend
from autoquant.errors import QualityError
from autoquant.evaluators.quality import FunctionQuality
from autoquant.evaluators.sensitivity import EVERY_LAYER, SENSITIVITIES, Change, fisher, together
from autoquant.evaluators.sensitivity.path import path_shares
from autoquant.evaluators.sensitivity.together import CalibrationModel

from .test_sensitivity import COARSE, HOW, INT8, brute_force, lively_llama, sites_of

METHODS = ("fisher", "path")
each_method = pytest.mark.parametrize("method", METHODS)


def changes_of(sites, how):
    return [
        Change(site, numerics, fmt, activation)
        for site in sites
        for numerics, (fmt, activation) in how.items()
    ]


def score(method, module, sites, quality, how=HOW):
    told = {}

    def on_scored(numerics, losses):
        assert numerics not in told and {key[1] for key in losses} == {numerics}
        told[numerics] = losses

    SENSITIVITIES[method].score(module, changes_of(sites, how), quality, on_scored)
    assert set(told) == set(how)
    return {key: loss for losses in told.values() for key, loss in losses.items()}


def isolated(module, sites, quality, how=HOW):
    found = {}
    changes = changes_of(sites, how)
    SENSITIVITIES["isolated"].score(
        module, changes, quality, lambda _name, losses: found.update(losses)
    )
    return found


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    monkeypatch.setattr(fisher, "_LEAST_ROWS", 120)


@pytest.fixture
def llama():
    return lively_llama(tied=True)


SMALL = {name: HOW[name] for name in ("int8-row:a16", "int8-row:a8-row", "bfloat16:a8-row")}


@each_method
def test_small_changes_are_predicted_in_nats(llama, quality, method, monkeypatch):
    monkeypatch.setattr(fisher, "_LEAST_ROWS", 3600)
    sites = list(sites_of(llama).values())
    found = score(method, llama, sites, quality, SMALL)
    exact = isolated(llama, sites, quality, SMALL)
    for numerics in SMALL:
        ratios = [found[site.name, numerics] / exact[site.name, numerics] for site in sites]
        assert 0.8 < sorted(ratios)[len(ratios) // 2] < 1.25, (numerics, ratios)
    assert sum(found[key] for key in exact) == pytest.approx(sum(exact.values()), rel=0.25)


def test_the_random_vectors_have_the_fisher_information_as_covariance():
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5])
    p = logits.softmax(-1)
    generator = torch.Generator().manual_seed(0)
    v = fisher.fisher_vector(logits.expand(200_000, 4), generator)
    covariance = v.T @ v / len(v)
    assert torch.allclose(covariance, torch.diag(p) - torch.outer(p, p), atol=2e-3)
    assert v.mean(0).abs().max() < 2e-3


def test_fisher_losses_are_the_same_every_time(llama, quality):
    sites = list(sites_of(llama).values())[:3]
    assert score("fisher", llama, sites, quality, SMALL) == score(
        "fisher", llama, sites, quality, SMALL
    )


@pytest.mark.parametrize("numerics", ["coarse:a16", "int8-row:a8-row"])
def test_shares_of_a_whole_path_sum_to_what_all_changes_together_cost(llama, quality, numerics):
    sites = list(sites_of(llama).values())
    fmt, activation = HOW[numerics]
    with torch.no_grad():
        module = copy.deepcopy(llama).float()
        calibration = CalibrationModel(module, quality)
        changes = [Change(site, numerics, fmt, activation) for site in sites]
        path = calibration.sites(
            changes, dict.fromkeys((site.name for site in sites), torch.bfloat16)
        )
        shares = path_shares(calibration, path, reach=1.0, points=8)
        whole = calibration.whole(path)
    assert whole > 1e-4
    assert sum(shares.values()) == pytest.approx(whole, rel=0.03)


@each_method
@pytest.mark.parametrize("tied", [True, False])
def test_what_all_layers_changed_together_cost_is_that_of_brute_force(
    quality, mean_divergence, method, tied
):
    module = lively_llama(tied=tied)
    sites = list(sites_of(module).values())
    found = score(method, module, sites, quality)
    for numerics, (fmt, activation) in HOW.items():
        every = Everything(sites)
        expected = brute_force(module, every, fmt, activation, quality, mean_divergence)
        assert found[EVERY_LAYER, numerics] == pytest.approx(expected, rel=2e-2, abs=1e-7), numerics


class Everything:
    """All sites as one."""

    def __init__(self, sites):
        self.parameters = tuple(name for site in sites for name in site.parameters)


@each_method
def test_a_change_that_changes_nothing_costs_nothing(llama, quality, method):
    sites = list(sites_of(llama).values())
    found = score(method, llama, sites, quality, {"bfloat16:a16": HOW["bfloat16:a16"]})
    assert set(found.values()) == {0.0} and len(found) == len(sites) + 1


@each_method
def test_a_weight_shared_by_two_layers_is_changed_in_both(quality, method, monkeypatch):
    monkeypatch.setattr(fisher, "_LEAST_ROWS", 3600)
    module = lively_llama()
    layers = module.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    site = sites_of(module)["model.layers.0.mlp.up_proj"]
    assert len(site.parameters) == 2
    found = score(method, module, [site], quality, SMALL)
    exact = isolated(module, [site], quality, SMALL)
    for numerics in SMALL:
        assert found[site.name, numerics] == pytest.approx(exact[site.name, numerics], rel=0.35), (
            numerics
        )


@each_method
def test_scoring_leaves_the_model_as_it_was(quality, method):
    module = lively_llama(tied=True)
    module.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    module.model.norm.weight.requires_grad_(True)
    before = {
        name: (id(p), p.requires_grad, p.detach().clone())
        for name, p in module.named_parameters(remove_duplicate=False)
    }
    score(method, module, list(sites_of(module).values()), quality, SMALL)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        identity, thawed, value = before[name]
        assert id(parameter) == identity and parameter.requires_grad == thawed
        assert (
            parameter.dtype == torch.bfloat16
            and torch.equal(parameter, value)
            and parameter.grad is None
        )
    assert not any(child._forward_hooks or "forward" in vars(child) for child in module.modules())


@each_method
@pytest.mark.parametrize("activation", ["a16", "a8-row", A8_FLOAT8_TENSOR])
def test_windows_in_one_batch_score_as_one_by_one(llama, quality, method, activation, monkeypatch):
    monkeypatch.setattr(fisher, "fisher_vector", lambda logits, _generator: logits.sin())
    monkeypatch.setattr(fisher, "_LEAST_ROWS", 1)
    monkeypatch.setattr(fisher, "_RUN_TOKENS", 10)
    sites = list(sites_of(llama).values())
    how = {"it": (INT8, activation)}
    at_once = score(method, llama, sites, quality, how)
    monkeypatch.setattr(together, "_LOGITS_AT_ONCE", 1)
    one_by_one = score(method, llama, sites, quality, how)
    assert sum(at_once.values()) > 0
    assert one_by_one == pytest.approx(at_once, rel=1e-3)


@pytest.mark.parametrize(("free_bytes", "times"), [(1 << 40, 1), (1 << 10, 2), (None, 2)])
def test_the_inside_of_a_block_is_computed_again_if_there_is_no_room_to_keep_it(
    llama, quality, monkeypatch, free_bytes, times
):
    monkeypatch.setattr(CpuBackend, "room_bytes", lambda _backend: free_bytes)
    runs = []
    llama.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_args: runs.append(torch.is_grad_enabled())
    )
    site = sites_of(llama)["model.layers.0.mlp.up_proj"]
    runs.clear()
    score("path", llama, [site], quality, {"coarse:a16": HOW["coarse:a16"]})
    assert runs.count(True) == times  # forward, and perhaps again for the gradients


def test_shares_are_the_same_whether_activations_were_kept_or_not(llama, quality, monkeypatch):
    site = sites_of(llama)["model.layers.0.mlp.up_proj"]
    found = []
    for free_bytes in (1 << 40, 1 << 10):
        monkeypatch.setattr(CpuBackend, "room_bytes", lambda _backend, free=free_bytes: free)
        found.append(score("path", llama, [site], quality, {"coarse:a16": HOW["coarse:a16"]}))
    assert found[0] == found[1]


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_factors_are_rounded_further_where_gradients_are_passed_back_than_the_device_asks_for(
    precision, llama, quality, monkeypatch
):
    monkeypatch.setattr(CpuBackend, "scoring_precision", precision)
    used = {"output": set(), "observe": set()}

    def noting(name, method):
        def noted(site, *tensors):
            used[name].add(torch.get_float32_matmul_precision())
            return method(site, *tensors)

        return noted

    for name in used:
        method = getattr(together.PathSite, name)
        monkeypatch.setattr(together.PathSite, name, noting(name, method))
    score("path", llama, list(sites_of(llama).values()), quality)
    assert used == {"output": {precision}, "observe": {"medium"}}
    assert torch.get_float32_matmul_precision() == "highest"


@each_method
def test_weights_that_there_is_no_room_for_are_made_again(llama, quality, method, monkeypatch):
    sites = list(sites_of(llama).values())
    kept = score(method, llama, sites, quality)
    monkeypatch.setattr(together.Room, "take", lambda _room, _size: False)
    assert score(method, llama, sites, quality) == kept


@each_method
def test_a_quality_function_is_refused(llama, method):
    with pytest.raises(QualityError, match=f"--sensitivity {method} needs a text"):
        score(
            method,
            llama,
            list(sites_of(llama).values()),
            FunctionQuality(lambda module, part: [0.0], "own"),
        )


class WithoutGradients(nn.Module):
    """A language model of one layer that detaches what the layer gives."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 64)

    def forward(self, ids):
        return self.head(self.inner(self.embedding(ids)).detach())


@each_method
def test_a_model_that_gradients_do_not_get_through_is_refused(quality, method):
    module = WithoutGradients().eval()
    sites = {site.name: site for site in sites_of_module(module)}
    with pytest.raises(
        QualityError, match=r"no gradient reaches 1 of 2 linears .* --sensitivity isolated"
    ):
        score(method, module, list(sites.values()), quality, {"coarse:a16": (COARSE, "a16")})


def sites_of_module(module):
    from autoquant.profiler.record import record
    from autoquant.records import Workload
    from autoquant.runtime.phases import make_phases

    ids = torch.zeros(1, 4, dtype=torch.long)
    return record(module, make_phases(as_loaded(module, "module", (ids,)), Workload.single())).sites


def test_a_path_part_of_the_way_agrees_with_isolated_losses_where_nothing_else_is_changed(
    llama, quality
):
    site = sites_of(llama)["model.layers.1.mlp.down_proj"]
    found = score("path", llama, [site], quality, {"coarse:a16": HOW["coarse:a16"]})
    assert found[site.name, "coarse:a16"] == pytest.approx(
        found[EVERY_LAYER, "coarse:a16"], rel=0.1
    )
    assert math.isfinite(found[EVERY_LAYER, "coarse:a16"])
