"""What another tool makes of a plan, beside the plan in memory."""

from __future__ import annotations

import copy

import pytest
from models.tiny_models import as_loaded, tiny_llama
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.likeness import likeness, read_text
from autoquant.records import RouteStep

NAME = "model.layers.0.mlp.up_proj.weight"
ROUTE = (RouteStep(upper_m=None, kernel="dequantize-matmul"),)


@pytest.fixture
def made():
    """A model with one int8 weight, what a faithful reader makes of it, and the logits before."""
    model, fmt = tiny_llama(), get_format("int8-row/plain")
    weight = model.get_parameter(NAME).data
    routed = RoutedWeight.wrap(fmt.store(weight), fmt.id, ROUTE, weight.dtype)
    again = copy.deepcopy(model)
    again.get_parameter(NAME).data = routed.dequantize().to(weight.dtype)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(routed, requires_grad=False)
    return as_loaded(model), again, read_text(as_loaded(tiny_llama()))


def test_a_faithful_reader_has_the_same_weights_and_logits(made):
    loaded, again, original = made
    found = likeness(loaded, again, [NAME], original)
    assert (found.weights, found.moved, found.others_differ) == (1, 0, [])
    assert found.same_logits and 0 < found.loss < 1e-3
    assert found.plan_loss == pytest.approx(found.loss, rel=0.5)


def test_a_weight_that_moved_is_counted_with_how_far(made):
    loaded, again, original = made
    weight = again.get_parameter(NAME).data
    weight[2, 3] += weight[2].abs().max() / 4
    found = likeness(loaded, again, [NAME], original)
    assert found.moved == 1 and found.farthest == pytest.approx(0.25, rel=0.02)
    assert not found.same_logits


def test_a_reader_that_computes_something_else_loses_more(made):
    loaded, again, original = made
    again.get_parameter(NAME).data.mul_(100)
    found = likeness(loaded, again, [NAME], original)
    assert found.loss > 100 * found.plan_loss


def test_another_unquantized_tensor_is_named(made):
    loaded, again, original = made
    again.model.norm.weight.data[0] = 2
    assert likeness(loaded, again, [NAME], original).others_differ == ["model.norm.weight"]


def test_quantized_tensors_of_a_reader_are_compared_by_their_numbers(made):
    loaded, again, original = made
    fmt = get_format("int8-row/plain")
    again.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        fmt.store(tiny_llama().get_parameter(NAME).data), requires_grad=False
    )
    found = likeness(loaded, again, [NAME], original)
    assert found.moved == 0 and 0 < found.loss < 1e-3
