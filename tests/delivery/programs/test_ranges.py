"""Ranges of sizes, each with one kernel for each layer."""

from __future__ import annotations

import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.programs.ranges import Rows, fixed, ranges, rows_of, within

INT8 = "int8-row/plain"


def routed(*route, n=64, k=64):
    torch.manual_seed(0)
    stored = get_format(INT8).store(torch.randn(n, k, dtype=torch.bfloat16))
    return RoutedWeight(stored, INT8, route, torch.bfloat16)


def bounds(found):
    return [(each.least, each.most) for each in found]


def test_rows_of_layers_grow_with_the_size_or_stay():
    inner, head = nn.Linear(8, 8), nn.Linear(8, 2)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = inner, head

        def forward(self, x):
            return self.head(self.inner(x)[:1, 0])

    model = Model()
    found = rows_of(model, lambda size: model(torch.ones(size, 5, 8)))
    assert found == {"inner.weight": Rows(5, 0), "head.weight": Rows(0, 1)}


def test_a_route_is_cut_where_its_kernel_changes():
    weights = {"a": routed((16, "int8pack-mm"), (None, "dequantize-matmul"))}
    found = ranges(weights, {"a": Rows(4, 0)}, joins_one=False)
    assert bounds(found) == [(1, 1), (2, 4), (5, None)]
    assert [each.kernels["a"] for each in found] == ["int8pack-mm"] * 2 + ["dequantize-matmul"]


def test_ranges_with_the_same_kernels_are_one():
    weights = {
        "a": routed((3, "int8pack-mm"), (8, "int8pack-mm"), (None, "int-mm")),
        "b": routed((None, "int-mm")),
    }
    rows = {"a": Rows(1, 0), "b": Rows(1, 0)}
    assert bounds(ranges(weights, rows, joins_one=False)) == [(1, 1), (2, 8), (9, None)]
    assert bounds(ranges(weights, rows, joins_one=True)) == [(1, 8), (9, None)]


def test_rows_that_do_not_depend_on_the_size_cut_nothing():
    weights = {"head": routed((1, "int8pack-mm"), (None, "int-mm"))}
    (found,) = ranges(weights, {"head": Rows(0, 1)}, joins_one=True)
    assert found.kernels == {"head": "int8pack-mm"} and found.most is None


def test_a_layer_whose_first_size_is_past_its_first_step_cuts_nothing():
    weights = {"a": routed((2, "int8pack-mm"), (None, "int-mm"))}
    (found,) = ranges(weights, {"a": Rows(4, 0)}, joins_one=True)
    assert found.kernels == {"a": "int-mm"} and found.least == 1


def test_ranges_end_at_the_largest_size():
    weights = {"a": routed((16, "int8pack-mm"), (None, "int-mm"))}
    found = ranges(weights, {"a": Rows(1, 0)}, joins_one=False)
    assert bounds(within(found, 40)) == [(1, 1), (2, 16), (17, 40)]
    assert bounds(within(found, 10)) == [(1, 1), (2, 10)]


def test_names_say_the_sizes():
    weights = {"a": routed((None, "int-mm"))}
    names = [fixed(weights, {}, 1, most).name("tokens") for most in (1, 4, None)]
    assert names == ["tokens_1", "tokens_1_to_4", "tokens_1_up"]
