"""What another tool makes of a plan, beside the plan in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from models.tiny_models import as_loaded, tiny_llama
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.routed import RoutedWeight
from autoquant.export.likeness import likeness
from autoquant.records import RouteStep

NAME = "model.layers.0.mlp.up_proj.weight"
ROUTE = (RouteStep(upper_m=None, kernel="dequantize-matmul"),)


@pytest.fixture
def pair():
    """A model with one int8 weight, and what a faithful reader makes of it."""
    model, fmt = tiny_llama(), get_format("int8-row/plain")
    weight = model.get_parameter(NAME).data
    routed = RoutedWeight.wrap(fmt.store(weight), fmt.id, ROUTE, weight.dtype)
    again = copy.deepcopy(model)
    again.get_parameter(NAME).data = routed.dequantize().to(weight.dtype)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(routed, requires_grad=False)
    return as_loaded(model), again


def test_a_faithful_reader_has_the_same_weights_and_logits(pair):
    found = likeness(*pair, [NAME])
    assert (found.weights, found.moved, found.others_differ) == (1, 0, [])
    assert found.same_logits and found.numbers_kl == 0 and found.plan_kl < 1e-3


def test_a_weight_that_moved_is_counted_with_how_far(pair):
    loaded, again = pair
    weight = again.get_parameter(NAME).data
    weight[2, 3] += weight[2].abs().max() / 4
    found = likeness(loaded, again, [NAME])
    assert found.moved == 1 and found.farthest == pytest.approx(0.25, rel=0.02)
    assert not found.same_logits and found.numbers_kl > 0


def test_another_unquantized_tensor_is_named(pair):
    loaded, again = pair
    again.model.norm.weight.data[0] = 2
    assert likeness(loaded, again, [NAME]).others_differ == ["model.norm.weight"]


def test_quantized_tensors_of_a_reader_are_compared_by_their_numbers(pair):
    loaded, again = pair
    fmt = get_format("int8-row/plain")
    again.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        fmt.store(tiny_llama().get_parameter(NAME).data), requires_grad=False
    )
    found = likeness(loaded, again, [NAME])
    assert found.moved == 0 and torch.isfinite(torch.tensor(found.plan_kl))
