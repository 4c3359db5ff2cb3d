"""The project's own CPU products by matrix instructions, on CPUs that have them."""

import pytest
import torch
import torch.nn.functional as F

from autoquant.candidates import get_format
from autoquant.candidates.kernels import cpu_rows, cpu_source
from autoquant.records import LinearShape

FORMATS = ("int8-row/plain", "int4-g32/lanes", "int4-g128/lanes", "int4s-g32/lanes")
SIZES = ((16, 1), (64, 64), (48, 172), (80, 40), (208, 257))
with_tiles = pytest.mark.skipif(
    cpu_source.tiles_missing() is not None, reason="this CPU has no matrix instructions"
)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def tiles(fmt):
    return fmt.kernel("cpu-tiles")


def relative_error(y, expected):
    return ((y.float() - expected).norm() / expected.norm()).item()


@with_tiles
@pytest.mark.parametrize("format_id", FORMATS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_any_size_and_number_of_rows_gives_the_product(format_id, n, k):
    fmt = get_format(format_id)
    stored, bias = fmt.store(numbers(n, k)), numbers(n, seed=1)
    for m in (1, 5, 16, 32, 33, 100):
        x = numbers(m, k, seed=m)
        for b in (bias, None):
            expected = F.linear(
                x.float(), fmt.dequantize(stored).float(), None if b is None else b.float()
            )
            y = tiles(fmt).linear(x, stored, b)
            assert (y.shape, y.dtype) == ((m, n), torch.bfloat16)
            assert relative_error(y, expected) < 6e-3


@with_tiles
def test_an_int8_weight_may_have_any_number_of_rows():
    fmt = get_format("int8-row/plain")
    for n in (1, 7, 17, 33):
        stored, x = fmt.store(numbers(n, 96)), numbers(40, 96, seed=1)
        expected = F.linear(x.float(), fmt.dequantize(stored).float())
        assert relative_error(tiles(fmt).linear(x, stored, None), expected) < 6e-3


@with_tiles
@pytest.mark.parametrize("format_id", FORMATS)
def test_no_rows_give_no_rows(format_id):
    fmt = get_format(format_id)
    y = tiles(fmt).linear(numbers(0, 64), fmt.store(numbers(32, 64)), None)
    assert y.shape == (0, 32)


@with_tiles
def test_the_librarys_products_are_what_they_were_between_those_by_tiles():
    fmt, weight = get_format("int4-g32/lanes"), numbers(256, 512)
    stored = fmt.store(weight)
    for m in (3, 64, 200):
        x = numbers(m, 512, seed=m)
        before, own = F.linear(x, weight), tiles(fmt).linear(x, stored, None)
        for _ in range(3):
            assert torch.equal(F.linear(x, weight), before)
            assert torch.equal(tiles(fmt).linear(x, stored, None), own)


@with_tiles
def test_a_model_of_float32_is_not_offered_them():
    shape = LinearShape(n=64, k=64, bias=False, dtype="float32")
    fmt = get_format("int8-row/plain")
    assert "bfloat16" in fmt.unsupported_reason(tiles(fmt), shape, 64, "cpu")


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_cpu_without_them_says_so_and_computes_by_the_library(format_id, monkeypatch):
    missing = "it needs a CPU with matrix instructions"
    monkeypatch.setattr(cpu_rows, "tiles_missing", lambda: missing)
    monkeypatch.setattr(cpu_source, "tiles_missing", lambda: missing)
    fmt = get_format(format_id)
    shape = LinearShape(n=48, k=172, bias=False, dtype="bfloat16")
    assert fmt.unsupported_reason(tiles(fmt), shape, 64, "cpu") == missing
    stored, x = fmt.store(numbers(48, 172)), numbers(64, 172, seed=1)
    expected = F.linear(x.float(), fmt.dequantize(stored).float())
    assert relative_error(tiles(fmt).linear(x, stored, None), expected) < 8e-3
