"""Columns that are scaled for their inputs: the same product, and less of it lost."""

import io

import pytest
import torch

from autoquant.candidates import InputStatistics, get_format, multiplied_numbers, select
from autoquant.candidates.flat import flatten_tensor, stored_bytes
from autoquant.candidates.formats.scaled import ScaledInputTensor

N, K = 64, 128
IDS = ("smooth-int8/plain", "awq-int4-g64/lanes")
each_format = pytest.mark.parametrize("fmt", [get_format(name) for name in IDS], ids=IDS)


def rows_of():
    """Inputs of which a few columns are much larger than the others, as in language models."""
    rows = torch.randn(256, K, generator=torch.Generator().manual_seed(0))
    rows[:, ::32] *= 40
    return rows


def weight_of(dtype=torch.bfloat16):
    return (torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / K**0.5).to(dtype)


def lost(fmt, numerics):
    """What the output loses, relative to its size."""
    rows, weight = rows_of(), weight_of()
    stored = fmt.store(weight, InputStatistics.of(rows))
    seen = fmt.activation_rounding(numerics, stored)(rows)
    expected = rows @ weight.float().t()
    off = seen @ multiplied_numbers(fmt, stored, numerics).t() - expected
    return (off.norm() / expected.norm()).item()


def test_smoothing_loses_less_of_int8_products_whose_inputs_have_large_columns():
    plain, smooth = get_format("int8-row/plain"), get_format("smooth-int8/plain")
    assert lost(smooth, "a8-row-scaled") < 0.75 * lost(plain, "a8-row")


def test_scaled_integers_lose_less_than_those_rounded_alone():
    alone, scaled = get_format("int4-g64-gptq/lanes"), get_format("awq-int4-g64/lanes")
    assert lost(scaled, "a16") < 0.9 * lost(alone, "a16")


@each_format
def test_scales_are_powers_of_two_which_round_no_number(fmt):
    stored = fmt.store(weight_of(), InputStatistics.of(rows_of()))
    mantissa, _ = torch.frexp(stored.factors.float())
    assert bool((mantissa == 0.5).all()) and stored.factors.unique().numel() > 1
    assert stored.factors.dtype == torch.bfloat16


@each_format
def test_inputs_without_large_columns_keep_about_one_scale(fmt):
    rows = torch.randn(256, K, generator=torch.Generator().manual_seed(0))
    stored = fmt.store(weight_of(), InputStatistics.of(rows))
    assert stored.factors.max() / stored.factors.min() <= 4


@each_format
def test_a_column_that_is_always_zero_gives_finite_numbers(fmt):
    rows = rows_of()
    rows[:, 7] = 0
    stored = fmt.store(weight_of(), InputStatistics.of(rows))
    assert bool(fmt.dequantize(stored).isfinite().all())


@each_format
def test_scales_take_two_bytes_a_column(fmt):
    stored = fmt.store(weight_of(), InputStatistics.of(rows_of()))
    assert stored_bytes(stored) == stored_bytes(stored.weight) + 2 * K


@each_format
def test_a_stored_weight_survives_a_file_without_pickled_code(fmt):
    stored = fmt.store(weight_of(), InputStatistics.of(rows_of()))
    file = io.BytesIO()
    torch.save({"weight": stored}, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)["weight"]
    assert type(again) is ScaledInputTensor
    assert torch.equal(fmt.dequantize(again), fmt.dequantize(stored))
    assert len(flatten_tensor(again)[0]) == len(flatten_tensor(stored)[0])


def test_a_search_gets_them_only_by_name():
    unasked = {each.format.values for each in select(["*", "int8*", "int4*"], "cpu")}
    assert not any(name.startswith(("smooth", "awq")) for name in unasked)
    asked = {each.format.values for each in select(["smooth-*", "awq-int4-g64"], "cpu")}
    assert asked == {"smooth-int8", "awq-int4-g64"}
