"""Linears whose weight is made anew in each call: folded, or left alone with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from autoquant.models.folded import folded_names
from autoquant.models.load import from_module

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "hook of weight_norm": weight_norm,
    "hook of spectral_norm": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.random_unstructured(
        prune.l1_unstructured(layer, "weight", 0.5), "weight", 0.5
    ),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_weight_that_is_always_the_same_becomes_a_parameter(way):
    torch.manual_seed(0)
    own = nn.Sequential(WAYS[way](nn.Linear(16, 12)), nn.ReLU()).eval()
    names = [name for name, _ in own.named_parameters()]
    expected = own(X)
    module = from_module(own).module
    assert folded_names(module) == ["0"]
    assert [name for name, _ in module.named_parameters()] == ["0.bias", "0.weight"]
    assert torch.allclose(module(X), expected, atol=1e-6)
    assert torch.allclose(copy.deepcopy(module)(X), expected, atol=1e-6)
    assert torch.equal(own(X), expected)  # the user's own makes its weight as before
    assert [name for name, _ in own.named_parameters()] == names


class Noise(nn.Module):
    def forward(self, weight):
        return weight + torch.randn_like(weight)


def test_a_weight_that_differs_from_call_to_call_stays_as_it_is():
    layer = nn.Linear(16, 12)
    parametrize.register_parametrization(layer, "weight", Noise())
    assert folded_names(from_module(nn.Sequential(layer)).module) == []


def test_a_subclass_that_changes_its_weight_itself_stays_as_it_is():
    class Centered(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight - self.weight.mean(), self.bias)

    module = from_module(nn.Sequential(Centered(16, 12))).module
    assert folded_names(module) == [] and type(module[0]) is Centered
