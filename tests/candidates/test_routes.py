"""Routes made whole where kernels do not take any number of rows."""

import pytest
import torch.nn.functional as F

from autoquant.candidates import A8_ROW, A16, Format, Kernel, get_format
from autoquant.candidates.routes import for_any_rows, route_words
from autoquant.records import LinearShape, RouteStep

SHAPE = LinearShape(n=64, k=128, bias=False, dtype="bfloat16")


def only_few(_shape, m, _device):
    return "up to 16" if m > 16 else None


def only_many(_shape, m, _device):
    return "from 33 on" if m < 33 else None


def never(_shape, _m, _device):
    return "not here"


def make(*kernels):
    made = tuple(
        Kernel(
            id=name,
            numerics=numerics,
            linear=F.linear,
            **({"unsupported": unsupported} if unsupported else {}),
        )
        for name, numerics, unsupported in kernels
    )
    return Format(id="own/plain", quantize=lambda w: w, dequantize=lambda s: s, kernels=made)


FEW, MANY, ANY = ("few", A16, only_few), ("many", A8_ROW, only_many), ("any", A16, None)
ROUNDING_ANY, ABSENT = ("rounding", A8_ROW, None), ("absent", A16, never)


def whole(fmt, *steps):
    route = tuple(RouteStep(upper_m=upper_m, kernel=kernel) for upper_m, kernel in steps)
    return [(step.upper_m, step.kernel) for step in for_any_rows(route, fmt, SHAPE, "cpu")]


def test_a_route_that_holds_for_any_rows_stays_as_it_is():
    for steps in (
        [(None, "any")],
        [(16, "few"), (None, "any")],
        [(32, "any"), (40, "many"), (None, "any")],
    ):
        assert whole(make(ANY, FEW, MANY), *steps) == steps


def test_a_kernel_for_few_rows_hands_over_to_one_for_any():
    assert whole(make(FEW, ANY), (None, "few")) == [(16, "few"), (None, "any")]
    assert whole(make(FEW, ANY), (100, "few"), (None, "any")) == [(16, "few"), (None, "any")]


def test_a_kernel_for_many_rows_has_another_before_it():
    assert whole(make(MANY, ANY), (None, "many")) == [(32, "any"), (None, "many")]
    assert whole(make(ANY, MANY), (4, "any"), (None, "many")) == [(32, "any"), (None, "many")]


def test_between_two_that_both_stop_a_third_stands_in():
    assert whole(make(FEW, MANY, ANY), (20, "few"), (None, "many")) == [
        (16, "few"),
        (32, "any"),
        (None, "many"),
    ]


def test_no_kernel_stands_in_that_rounds_activations_where_the_route_does_not():
    assert whole(make(FEW, ROUNDING_ANY), (None, "few")) == [(None, "few")]
    assert whole(make(FEW, ROUNDING_ANY, ANY), (None, "few")) == [(16, "few"), (None, "any")]
    assert whole(make(FEW, MANY, ROUNDING_ANY), (16, "few"), (None, "many")) == [
        (16, "few"),
        (32, "rounding"),
        (None, "many"),
    ]


def test_a_kernel_that_the_device_cannot_use_at_all_is_left_for_its_own_error():
    assert whole(make(ABSENT, ANY), (None, "absent")) == [(None, "absent")]


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_projects_int4_product_for_a_few_rows_is_never_asked_for_more(group, monkeypatch):
    monkeypatch.setattr(
        "autoquant.candidates.formats.int4_tiled.cuda_source_unsupported",
        lambda _device, _what: None,
    )
    fmt = get_format(f"int4-g{group}/tiled")
    route = (RouteStep(upper_m=None, kernel="rows"),)
    assert (
        route_words(for_any_rows(route, fmt, SHAPE, "cuda"))
        == "rows up to 16 rows, unpack-matmul above"
    )


def test_integer_products_on_a_gpu_are_never_asked_for_few_rows():
    fmt = get_format("int8-row/plain")
    assert fmt.unsupported_reason(fmt.kernel("int-mm"), SHAPE, 16, "cuda")
    route = (RouteStep(upper_m=None, kernel="int-mm"),)
    found = for_any_rows(route, fmt, SHAPE, "cuda")
    assert [(step.upper_m, step.kernel) for step in found] == [
        (16, "dequantize-matmul"),
        (None, "int-mm"),
    ]
