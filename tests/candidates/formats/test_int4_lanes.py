"""int4 weights in the lanes of the project's own CPU kernels."""

import pytest
import torch

from autoquant.candidates import get_format
from autoquant.candidates.base import InputStatistics
from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.int4_lanes import Int4LanesTensor
from autoquant.candidates.formats.int4_rounding import tinygemm_rounding
from autoquant.candidates.formats.rounding import Grid, nearest
from autoquant.candidates.joined import join, whole_of
from autoquant.candidates.routed import RoutedWeight
from autoquant.records import RouteStep

N, K = 48, 256


def normal(n=N, k=K, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_lanes_hold_the_rounded_numbers(group):
    q, scale, zero = tinygemm_rounding(normal(), group)
    expected = (q.reshape(N, -1, group) - 8) * scale.float()[..., None] + zero.float()[..., None]
    fmt = get_format(f"int4-g{group}/lanes")
    assert torch.equal(fmt.dequantize(fmt.store(normal())), expected.reshape(N, K))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_lanes_hold_integers_times_a_scale_and_nothing_else(group):
    grid = Grid(bits=4, group=group, symmetric=True)
    rounded = nearest(normal(), grid)
    expected = rounded.q.reshape(N, -1, group) * rounded.scale.float()[..., None]
    fmt = get_format(f"int4s-g{group}/lanes")
    stored = fmt.store(normal())
    assert torch.equal(fmt.dequantize(stored), expected.reshape(N, K))
    assert stored_bytes(stored) == N * K // 2 + N * (K // group) * 2


def test_a_word_holds_eight_columns_of_a_row_even_ones_below_odd_ones():
    q = torch.zeros(16, 64, dtype=torch.int32)
    row, word = 5, 3
    q[row, 8 * word : 8 * word + 8] = torch.arange(1, 9, dtype=torch.int32)
    ones = torch.ones(16, 1, dtype=torch.bfloat16)
    words = Int4LanesTensor.pack(q, ones, ones).qdata.reshape(8, 16)
    assert words[word, row].item() & 0xFFFFFFFF == 0x86427531
    assert int(words.count_nonzero()) == 1


@pytest.mark.parametrize("values", ["int4-g128", "int4s-g128"])
@pytest.mark.parametrize("rounding", ["", "-hqq", "-clip", "-gptq"])
def test_a_last_group_in_part_is_rounded_like_a_whole_one(values, rounding):
    k = 172
    weight = normal(k=k)
    x = torch.randn(512, k, generator=torch.Generator().manual_seed(1))
    fmt = get_format(f"{values}{rounding}/lanes")
    stored = fmt.store(weight, InputStatistics(x.t() @ x))
    assert stored.shape == weight.shape
    numbers = fmt.dequantize(stored)
    error = (numbers - weight.float()).norm(dim=0) / weight.float().norm(dim=0)
    assert error[:128].mean() < 0.14 and error[128:].mean() < 0.14


@pytest.mark.parametrize("values", ["int4-g64", "int4s-g64"])
def test_weights_behind_one_another_are_one_weight(values):
    fmt = get_format(f"{values}/lanes")
    route = (RouteStep(upper_m=None, kernel="unpack-matmul"),)
    weights = [
        RoutedWeight.wrap(fmt.store(normal(n, seed=n)), fmt.id, route, torch.bfloat16)
        for n in (48, 16, 80)
    ]
    joined = join(weights)
    whole = whole_of(joined[1])
    assert whole is not None and whole.start == 48
    for before, after in zip(weights, joined, strict=True):
        assert torch.equal(fmt.dequantize(before.stored), fmt.dequantize(after.stored))
