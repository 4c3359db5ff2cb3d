"""The project's own product of a few rows with float8 weights, at the edges of what it takes."""

import pytest
import torch

from autoquant.candidates import get_format
from autoquant.candidates.kernels.float8_rows import float8_rows, multiply_float8_rows

pytestmark = pytest.mark.gpu


def normal(*size, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda").bfloat16()


def off(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
@pytest.mark.parametrize(
    ("n", "k"), [(8, 128), (24, 384), (520, 1024), (1000, 2816), (9000, 256), (70000, 128)]
)
def test_the_product_of_a_few_rows_is_right_for_every_size(n, k, m):
    weight, x, bias = (
        get_format("float8-row/plain").store(normal(n, k)),
        normal(m, k, seed=1),
        normal(n, seed=2),
    )
    numbers = weight.qdata.double() * weight.scale.double()
    y = float8_rows(x, weight.qdata, weight.scale, bias)
    assert off(y, x.double() @ numbers.t() + bias.double()) < 0.003
    assert torch.equal(y, float8_rows(x, weight.qdata, weight.scale, bias)), "not the same twice"


def test_every_number_of_float8_is_read_as_what_it_is():
    """All 254 finite ones, the smallest without a leading 1 among them, each picked by a row of
    ones and zeros.
    """
    bits = torch.arange(256, device="cuda", dtype=torch.uint8)
    values = bits.view(torch.float8_e4m3fn)
    values = torch.where(values.float().isfinite(), values.float(), 0.0).to(torch.float8_e4m3fn)
    weight = torch.zeros(256, 128, device="cuda").to(torch.float8_e4m3fn)
    weight[:, 37] = values
    x = torch.zeros(1, 128, device="cuda", dtype=torch.bfloat16)
    x[0, 37] = 1
    y = float8_rows(x, weight, torch.ones(256, 1, device="cuda"), None)
    assert torch.equal(y[0].float(), values.float())


def test_large_and_small_activations_neither_overflow_nor_vanish():
    weight = get_format("float8-row/plain").store(normal(64, 1024))
    numbers = weight.qdata.double() * weight.scale.double()
    for factor in (1e30, 1e-30):
        x = normal(1, 1024) * factor
        assert (
            off(float8_rows(x, weight.qdata, weight.scale, None), x.double() @ numbers.t()) < 0.003
        )


@pytest.mark.parametrize("rows", [(1,), (2, 3), (2, 1, 8), (0,)])
def test_the_operator_computes_what_its_implementation_does(rows):
    fmt = get_format("float8-row/plain")
    weight, x, bias = fmt.store(normal(72, 1024)), normal(*rows, 1024, seed=1), normal(72, seed=2)
    y = multiply_float8_rows(x, weight.qdata, weight.scale, bias)
    assert y.shape == (*rows, 72) and torch.equal(
        y, float8_rows(x, weight.qdata, weight.scale, bias)
    )
    assert torch.equal(y, fmt.kernel("rows").linear(x, weight, bias))
    # Not test_schema: it multiplies what it is given, which PyTorch does not implement for float8.
    torch.library.opcheck(
        float8_rows, (x, weight.qdata, weight.scale, bias), test_utils=("test_faketensor",)
    )
