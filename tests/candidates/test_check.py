"""What counts as a wrong result."""

import pytest
import torch

from autoquant.candidates.check import changed, fault


@pytest.fixture
def expected():
    return torch.randn(1, 4, 4096, generator=torch.Generator().manual_seed(0))


def test_rounding_to_bfloat16_is_no_fault(expected):
    assert fault(expected.bfloat16(), expected, torch.bfloat16) == ""


def test_a_few_wrong_outputs_of_thousands_are_a_fault(expected):
    y = expected.clone()
    y[..., -1] = 0
    assert ((y - expected).norm() / expected.norm()).item() < 0.02
    assert "an output is off by" in fault(y, expected, torch.float32)


def test_an_output_far_above_the_others_may_be_off_by_its_own_rounding(expected):
    expected[0, 0, 7] = 3000.0
    assert fault(expected.bfloat16(), expected, torch.bfloat16) == ""


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 40.0])
def test_one_number_that_is_far_off_is_a_fault(expected, number):
    y = expected.clone()
    y[0, 2, 5] = number
    assert fault(y, expected, torch.float32) != ""


class Lazy(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda y: y.as_subclass(Lazy), "a Lazy (1, 4, 4096)"),
        (lambda y: y[0], "a Tensor (4, 4096)"),
        (lambda y: y.double(), "of torch.float64"),
        (lambda y: [y], "it returns list"),
    ],
    ids=["lazy", "shape", "dtype", "list"],
)
def test_anything_but_a_plain_tensor_of_the_right_kind_is_a_fault(expected, make, words):
    assert words in fault(make(expected), expected, torch.float32)


def test_more_is_allowed_where_said(expected):
    y = expected * 1.05
    assert "relative error 0.05" in fault(y, expected, torch.float32)
    assert fault(y, expected, torch.float32, allowance=5) == ""


def test_a_result_of_no_rows_is_right():
    empty = torch.empty(1, 0, 8)
    assert fault(empty, empty, torch.float32) == ""


def test_a_bit_makes_a_difference(expected):
    y = expected.clone()
    assert not changed(y, expected)
    y[0, 0, 0] = torch.nextafter(y[0, 0, 0], torch.tensor(10.0))
    assert changed(y, expected)
