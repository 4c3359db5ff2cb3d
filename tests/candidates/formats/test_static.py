"""Ranges of activations that are stored: found on a text, rounded in, clipped at."""

import io

import pytest
import torch

from autoquant.candidates import InputStatistics, get_format, select
from autoquant.candidates.base import STORED_ROUNDING
from autoquant.candidates.formats.static import StaticRangeTensor
from autoquant.candidates.joined import stack_rows
from autoquant.errors import CandidateError

N, K = 48, 64
INT8, FLOAT8 = get_format("static-int8/plain"), get_format("static-float8/plain")
each_format = pytest.mark.parametrize("fmt", [INT8, FLOAT8], ids=lambda fmt: fmt.values)


def rows_of(seed=0):
    return torch.randn(200, K, generator=torch.Generator().manual_seed(seed))


def weight_of(dtype=torch.bfloat16):
    return (torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / K**0.5).to(dtype)


def range_of(rows, numerics="a8-static"):
    return InputStatistics.of(rows).range(STORED_ROUNDING[numerics]).item()


def test_a_range_grows_with_the_numbers():
    assert range_of(8 * rows_of()) == pytest.approx(8 * range_of(rows_of()), rel=0.01)


def test_a_range_has_the_least_error_of_those_around_it():
    rows = rows_of()
    found = range_of(rows)
    energy = rows.square().mean(-1, keepdim=True)

    def error(largest):
        rounded = STORED_ROUNDING["a8-static"](rows, torch.tensor(largest))
        return ((rounded - rows).square() / energy).sum().item()

    assert error(found) <= min(error(found * factor) for factor in (0.5, 0.7, 1.4, 2.0))


def test_a_few_rows_of_huge_numbers_do_not_take_the_resolution_of_the_others():
    rows = rows_of()
    rows[0] *= 2000
    assert range_of(rows) < 10
    assert rows.abs().max() > 1000


def test_float8_holds_the_largest_number():
    assert range_of(rows_of(), "a8-float8-static") >= 0.7 * rows_of().abs().max().item()


def test_ranges_of_parts_of_a_text_are_those_of_the_whole():
    whole = InputStatistics.of(rows_of())
    parts = InputStatistics.of(rows_of()[:77]).copy()
    parts.add(InputStatistics.of(rows_of()[77:]))
    torch.testing.assert_close(parts.magnitudes, whole.magnitudes)
    torch.testing.assert_close(parts.hessian, whole.hessian)
    assert torch.equal(parts.largest, whole.largest)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inputs_that_are_not_finite_are_an_error(value):
    rows = rows_of()
    rows[3, 5] = value
    with pytest.raises(CandidateError, match="not finite"):
        range_of(rows)


@each_format
def test_what_is_beyond_the_range_is_clipped(fmt):
    stored = fmt.store(weight_of(), InputStatistics.of(rows_of()))
    largest = fmt.input_kept(stored)
    x = torch.tensor([0.5, 1.0, 3.0]) * largest
    numerics = next(k.numerics for k in fmt.kernels if "static" in k.numerics)
    rounded = fmt.activation_rounding(numerics, stored)(x)
    torch.testing.assert_close(rounded, torch.tensor([0.5, 1.0, 1.0]) * largest, rtol=0.04, atol=0)


@each_format
def test_the_numbers_are_those_of_the_format_that_rounds_at_run_time(fmt):
    weight = weight_of()
    stored = fmt.store(weight, InputStatistics.of(rows_of()))
    error = (fmt.dequantize(stored) - weight.float()).norm() / weight.float().norm()
    assert error < (0.012 if fmt is INT8 else 0.04)


@each_format
def test_a_weight_without_inputs_is_refused(fmt):
    with pytest.raises(CandidateError, match="were not given"):
        fmt.store(weight_of())


def test_weights_of_one_input_are_stacked_with_its_range():
    statistics = InputStatistics.of(rows_of())
    parts = [INT8.store(weight_of(), statistics), INT8.store(2 * weight_of(), statistics)]
    whole = stack_rows(parts)
    assert whole.shape == (2 * N, K) and whole.input_range == parts[0].input_range


@each_format
def test_a_stored_weight_survives_a_file_without_pickled_code(fmt):
    stored = fmt.store(weight_of(), InputStatistics.of(rows_of()))
    file = io.BytesIO()
    torch.save({"weight": stored}, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)["weight"]
    assert type(again) is StaticRangeTensor and again.input_range == stored.input_range
    assert torch.equal(fmt.dequantize(again), fmt.dequantize(stored))


def test_a_search_gets_them_only_by_name():
    for device in ("cpu", "cuda"):
        unasked = {each.format.id for each in select(["*", "int8*", "float8*"], device)}
        assert not unasked & {INT8.id, FLOAT8.id}
    assert {each.format.id for each in select(["static-*"], "cpu")} == {INT8.id, FLOAT8.id}
