"""int2, int3 and int5: what they hold, how many bytes it takes, and that nobody gets them unasked."""

import io

import pytest
import torch
import torch.nn.functional as F

from autoquant.candidates import get_format, select
from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.low_bit import CHOICES, BitPlaneTensor
from autoquant.records import LinearShape

each_choice = pytest.mark.parametrize("values", CHOICES)


def low_bit(values):
    return get_format(f"{values}/bit-planes")


def weight_of(dtype=torch.float32):
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    return weight


@pytest.mark.parametrize("values", [v for v, grid in CHOICES.items() if grid.symmetric])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_the_nearest_of_a_symmetric_grid(values, dtype):
    weight, bits, group = weight_of(dtype), CHOICES[values].bits, CHOICES[values].group
    fmt = low_bit(values)
    found = fmt.dequantize(fmt.store(weight)).reshape(24, -1, group)
    groups = weight.float().reshape(24, -1, group)
    scale = (
        (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5))
        .clamp(min=1e-12)
        .to(dtype)
        .float()
    )
    grid = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * scale.unsqueeze(-1)
    nearest = (groups.unsqueeze(-1) - grid).abs().amin(-1)
    torch.testing.assert_close((groups - found).abs(), nearest, atol=1e-6, rtol=1e-5)
    assert found.unique().numel() > 2 and not found[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grid_with_a_smallest_number_spans_each_group(dtype):
    weight, fmt = weight_of(dtype), low_bit("int5-g32")
    found = fmt.dequantize(fmt.store(weight)).reshape(24, -1, 32)
    groups = weight.float().reshape(24, -1, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 31
    torch.testing.assert_close(found.amin(-1), groups.amin(-1), atol=1e-5, rtol=0)
    assert bool(((found - groups).abs().amax(-1) <= 0.7 * step + 1e-5).all())
    assert not found[3].any()


@each_choice
def test_a_weight_takes_the_bits_it_says(values):
    grid = CHOICES[values]
    stored = low_bit(values).store(weight_of(torch.bfloat16))
    numbers_of_a_group = 1 if grid.symmetric else 2
    assert stored_bytes(stored) * 8 == 24 * 192 * (grid.bits + 16 * numbers_of_a_group / grid.group)


@each_choice
def test_the_product_is_that_of_the_numbers(values):
    fmt = low_bit(values)
    stored = fmt.store(weight_of())
    x, bias = torch.randn(2, 5, 192), torch.randn(24)
    torch.testing.assert_close(
        fmt.kernels[0].linear(x, stored, bias), F.linear(x, fmt.dequantize(stored), bias)
    )


@each_choice
def test_a_stored_weight_survives_a_file_without_pickled_code(values):
    stored = low_bit(values).store(weight_of(torch.bfloat16))
    file = io.BytesIO()
    torch.save({"weight": stored}, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)["weight"]
    assert type(again) is BitPlaneTensor and torch.equal(
        again.unpack(torch.float32), stored.unpack(torch.float32)
    )


def test_a_shape_that_does_not_divide_is_left_out():
    shape = LinearShape(n=8, k=96, bias=False, dtype="bfloat16")
    assert "group size 64" in low_bit("int3-g64").unsupported(shape, 1, "cpu")
    assert low_bit("int3-g32").unsupported(shape, 1, "cpu") is None


def test_a_search_gets_them_only_by_name():
    assert not any(
        "bit-planes" in each.format.id for each in select(["*"], "cuda") + select(["*"], "cpu")
    )
    assert {each.format.id for each in select(["int2*", "int3*", "int5*"], "cpu")} == {
        low_bit(values).id for values in CHOICES
    }
