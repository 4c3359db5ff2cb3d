"""What surrounds the project's own CUDA kernels; what they compute is tested on GPUs."""

import re
from functools import partial
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch

from autoquant.candidates import get_format
from autoquant.candidates.formats import float8, int4_tiled
from autoquant.candidates.kernels import few_rows, float8_rows
from autoquant.candidates.kernels.few_rows import MOST_ROWS, setting_of
from autoquant.records import LinearShape

SOURCES = files("autoquant.candidates.kernels")


@pytest.mark.parametrize("settings", [int4_tiled.SETTINGS, float8_rows.SETTINGS])
def test_every_size_has_a_setting_that_a_block_can_have(settings):
    for n in (8, 1024, 4096, 6144, 28672, 128256, 10**6):
        for m in range(1, MOST_ROWS + 1):
            warps, tiles, blocks = setting_of(settings, n, m, processors=132)
            assert 32 * warps <= 1024 and 32 * warps * blocks <= 2048
            shared_bytes = 4 * warps * 8 * -(-m // 8) * 16 * tiles
            assert shared_bytes <= 48 << 10


@pytest.mark.parametrize("m", [1, 8, 9, 16])
def test_more_rows_of_an_int4_weight_get_fewer_warps_each(m):
    sizes = (1024, 4096, 6144, 28672, 128256)
    warps = [setting_of(int4_tiled.SETTINGS, n, m, processors=132)[0] for n in sizes]
    assert warps == sorted(warps, reverse=True) and warps[0] > warps[-1]


def test_few_tiles_get_more_warps_each_and_more_rows_their_own_setting():
    settings = [(1, (16, 1, 1), (16, 1, 2)), (0, (4, 4, 4), (4, 2, 3))]
    assert setting_of(settings, 16 * 132, 8, processors=132) == (16, 1, 1)
    assert setting_of(settings, 16 * 132, 9, processors=132) == (16, 1, 2)
    assert setting_of(settings, 16 * 132 + 8, 1, processors=132) == (4, 4, 4)


@pytest.mark.parametrize(
    ("m", "setting"), [(1, (16, 1, 2)), (8, (16, 1, 2)), (9, (8, 2, 3)), (16, (8, 2, 3))]
)
def test_a_product_is_launched_with_what_its_source_asks_for(monkeypatch, m, setting):
    compiled, launched = [], []

    def kernel(source, name, defines, device):
        compiled.append((source, name, dict(defines), device))
        return SimpleNamespace(launch=lambda *arguments: launched.append(arguments))

    monkeypatch.setattr(few_rows, "_launches", {})
    monkeypatch.setattr(few_rows, "cuda_kernel", kernel)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
    )
    x, weight, scale, bias = (
        torch.ones(128, m).t(),
        torch.ones(72, 64),
        torch.ones(72, 1),
        torch.ones(72),
    )
    y = few_rows.multiply_rows(
        "a.cu", "a", [(0, (16, 1, 2), (8, 2, 3))], x, (weight, scale), bias, [("GROUP", 64)]
    )
    warps, tiles, blocks = setting
    defines = {
        "GROUP": 64,
        "WARPS": warps,
        "TILES": tiles,
        "BLOCKS": blocks,
        "EIGHTS": 1 if m <= 8 else 2,
    }
    assert compiled == [("a.cu", "a", defines, x.device)]
    [(count, threads, given_x, *rest)] = launched
    assert (count, threads) == (5 if tiles == 1 else 3, 32 * warps), "72 rows in tiles of 16"
    assert given_x.is_contiguous() and torch.equal(given_x, x)
    assert rest[0] is weight and rest[1] is scale and rest[2] is bias and rest[3] is y
    assert rest[4:] == [m, 72, 128] and y.shape == (m, 72)
    product = partial(few_rows.multiply_rows, "a.cu", "a", [(0, (16, 1, 2), (8, 2, 3))])
    y = product(x.reshape(m, 1, 128), (weight, scale), None, [("GROUP", 64)])
    assert len(compiled) == 1 and launched[1][6:] == (y, m, 72, 128) and y.shape == (m, 1, 72)
    assert (
        product(x[:0], (weight, scale), None, [("GROUP", 64)]).shape == (0, 72)
        and len(launched) == 2
    )


@pytest.mark.parametrize("source", ["int4_tiled.cu", "float8_rows.cu"])
def test_what_a_source_includes_lies_beside_it(source):
    included = re.findall(r'#include "(.+)"', SOURCES.joinpath(source).read_text())
    assert included
    assert all(name.endswith(".cuh") and SOURCES.joinpath(name).is_file() for name in included)


@pytest.mark.parametrize(
    ("n", "k", "dtype", "m", "reason"),
    [
        (20, 256, "bfloat16", 1, "n divisible by 8 and k by 128, not 20x256"),
        (24, 192, "bfloat16", 1, "n divisible by 8 and k by 128, not 24x192"),
        (24, 256, "float16", 1, "bfloat16 activations, not float16"),
        (24, 256, "bfloat16", 17, "up to 16 rows, not 17"),
        (24, 256, "bfloat16", 16, None),
    ],
)
def test_what_the_float8_product_does_not_take_is_refused_with_the_reason(
    monkeypatch, n, k, dtype, m, reason
):
    monkeypatch.setattr(float8, "cuda_source_unsupported", lambda *_: None)
    fmt = get_format("float8-row/plain")
    found = fmt.unsupported_reason(
        fmt.kernel("rows"), LinearShape(n=n, k=k, bias=False, dtype=dtype), m, "cuda"
    )
    assert found is None if reason is None else reason in found


def test_without_a_gpu_the_float8_product_says_so():
    fmt = get_format("float8-row/plain")
    shape = LinearShape(n=24, k=256, bias=False, dtype="bfloat16")
    assert "needs a CUDA GPU" in fmt.unsupported_reason(fmt.kernel("rows"), shape, 1, "cpu")


def test_the_compiler_is_told_what_the_float8_product_gives():
    stored = get_format("float8-row/plain").store(torch.randn(24, 128).bfloat16())
    x = torch.empty(2, 3, 128, dtype=torch.bfloat16, device="meta")
    y = float8_rows.float8_rows(
        x.reshape(-1, 128), stored.qdata.to("meta"), stored.scale.to("meta"), None
    )
    assert (y.shape, y.dtype, y.device.type) == ((6, 24), torch.bfloat16, "meta")
