"""Weights stored behind one another."""

import pytest
import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.flat import flatten_tensor, stored_bytes, unflatten_tensor
from autoquant.candidates.joined import join, unjoinable, whole_of
from autoquant.candidates.routed import RoutedWeight
from autoquant.records import RouteStep

JOINING = ("int8-row/plain", "float8-row/plain")


def weight(n, fmt_id="int8-row/plain", k=64, kernel="dequantize-matmul", seed=0):
    fmt = get_format(fmt_id)
    generator = torch.Generator().manual_seed(seed)
    stored = fmt.store(torch.randn(n, k, generator=generator).to(torch.bfloat16))
    return RoutedWeight.wrap(
        stored, fmt_id, (RouteStep(upper_m=None, kernel=kernel),), torch.bfloat16
    )


@pytest.mark.parametrize("fmt_id", JOINING)
def test_joined_weights_are_the_same_numbers_and_take_no_more_memory(fmt_id):
    weights = [weight(n, fmt_id, seed=n) for n in (32, 16, 64)]
    joined = join(weights)
    for before, after in zip(weights, joined, strict=True):
        assert torch.equal(before.dequantize(), after.dequantize()) and before.route == after.route
        assert stored_bytes(before) == stored_bytes(after)
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for w in joined
        for part in flatten_tensor(w)[0]
    }
    assert sum(storages.values()) == sum(stored_bytes(w) for w in weights)


@pytest.mark.parametrize("fmt_id", JOINING)
def test_the_whole_of_a_joined_weight_has_the_rows_of_all(fmt_id):
    weights = [weight(n, fmt_id, seed=n) for n in (32, 16, 64)]
    joined = join(weights)
    for each, start in zip(joined, (0, 32, 48), strict=True):
        whole = whole_of(each)
        assert whole.start == start
        together = unflatten_tensor(whole.rebuild, list(whole.parts))
        assert tuple(together.shape) == (112, 64)
        assert torch.equal(together.dequantize(), torch.cat([w.dequantize() for w in weights]))


def test_a_weight_that_stands_for_itself_is_part_of_nothing():
    assert whole_of(weight(32)) is None
    assert whole_of(join([weight(32)])[0]) is None, "a group of one"


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ([weight(32, "float8-row/plain")], "formats or routes"),
        ([weight(32, kernel="int-mm")], "formats or routes"),
        ([weight(32, k=128)], "widths or dtypes"),
        ([nn.Parameter(torch.ones(32, 64))], "formats or routes"),
    ],
)
def test_what_cannot_be_multiplied_as_one_is_not_joined(others, reason):
    assert reason in unjoinable([weight(32), *others])
    with pytest.raises(ValueError, match=reason):
        join([weight(32), *others])


def test_a_format_whose_tensors_do_not_lie_row_by_row_is_not_joined():
    pair = [weight(64, "int4-g32/cpu-packed", kernel="int4pack-mm")] * 2
    assert "row by row" in unjoinable(pair)
