"""2:4 sparsity: what is kept, where it lies, and what better masks are worth."""

import io

import pytest
import torch

from autoquant.candidates import InputStatistics, get_format, select
from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.masks import by_inputs, by_magnitude, compensated
from autoquant.candidates.formats.sparse24 import CHOICES, KINDS, Sparse24Tensor

N, K = 40, 128
IDS = [f"{kind.values}{choice.ending}/plain" for kind in KINDS for choice in CHOICES]
each_format = pytest.mark.parametrize("name", IDS)


def weight_of(dtype=torch.bfloat16):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / K**0.5
    weight[3] = 0
    return weight.to(dtype)


def rows_of():
    """Inputs whose columns differ in size and are related to one another."""
    made = torch.Generator().manual_seed(1)
    mixed = torch.randn(K, K, generator=made) / K**0.5 + torch.eye(K)
    rows = torch.randn(400, K, generator=made) @ mixed
    return rows * torch.linspace(0.1, 3, K)[torch.randperm(K, generator=made)]


def stored_as(name):
    fmt = get_format(name)
    return fmt, fmt.store(weight_of(), InputStatistics.of(rows_of()))


@each_format
def test_two_of_every_four_are_kept(name):
    fmt, stored = stored_as(name)
    numbers = fmt.dequantize(stored)
    kept = (numbers.reshape(N, -1, 4) != 0).sum(-1)
    assert int(kept.max()) == 2 and kept.float().mean() > 1.9
    assert not numbers[3].any()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.values)
def test_by_magnitude_the_largest_two_of_every_four_keep_their_numbers(kind):
    fmt, stored = stored_as(f"{kind.values}/plain")
    weight = weight_of().float().reshape(N, -1, 4)
    found = fmt.dequantize(stored).reshape(N, -1, 4)
    largest = weight.abs().topk(2, dim=-1).values  # of equals, either one may be kept
    torch.testing.assert_close(found.abs().topk(2, dim=-1).values, largest, rtol=0.07, atol=2e-3)
    kept = found != 0
    torch.testing.assert_close(found[kept], weight[kept], rtol=0.07, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.values)
def test_a_weight_takes_half_its_numbers_and_a_bit_for_each_place(kind):
    _, stored = stored_as(f"{kind.values}/plain")
    bits = 9 if kind.dtype is None else 5 + 16 / K
    assert stored_bytes(stored) * 8 == N * K * bits


def test_masks_that_know_the_inputs_lose_less_of_the_output():
    weight, rows = weight_of(), rows_of()
    inputs = InputStatistics.of(rows)

    def lost(mask):
        return ((mask(weight, inputs) - weight.float()) @ rows.t()).norm().item()

    assert lost(by_inputs) < 0.95 * lost(by_magnitude)
    assert lost(compensated) < 0.95 * lost(by_inputs)


def test_of_equal_weights_the_first_two_are_kept():
    assert by_magnitude(torch.ones(1, 8)).tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


@each_format
def test_a_stored_weight_survives_a_file_without_pickled_code(name):
    fmt, stored = stored_as(name)
    file = io.BytesIO()
    torch.save({"weight": stored}, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)["weight"]
    assert type(again) is Sparse24Tensor
    assert torch.equal(fmt.dequantize(again), fmt.dequantize(stored))


def test_a_search_gets_them_only_by_name_and_each_mask_by_its_own():
    assert not any("sparse24" in each.format.id for each in select(["*"], "cuda"))
    assert {each.format.id for each in select(["sparse24*/plain"], "cuda")} == {
        f"{kind.values}/plain" for kind in KINDS
    }
    assert {each.format.id for each in select(["sparse24-int8-wanda/plain"], "cuda")} == {
        "sparse24-int8-wanda/plain"
    }


def test_masks_share_the_timings_of_the_largest():
    assert get_format("sparse24-int8-sparsegpt/plain").timed_as == "sparse24-int8/plain"
