"""What surrounds the project's own CUDA kernels; what they compute is tested on GPUs."""

import re
from importlib.resources import files

import pytest
import torch

from autoquant.candidates import float8, float8_rows, get_format, int4_tiled
from autoquant.candidates.cuda_source import MOST_ROWS, setting_of
from autoquant.records import LinearShape

SOURCES = files("autoquant.candidates")


@pytest.mark.parametrize("settings", [int4_tiled.SETTINGS, float8_rows.SETTINGS])
def test_every_size_has_a_setting_that_a_block_can_have(settings):
    for n in (8, 1024, 4096, 6144, 28672, 128256, 10**6):
        for m in range(1, MOST_ROWS + 1):
            warps, tiles, blocks = setting_of(settings, n, m, processors=132)
            assert 32 * warps <= 1024 and 32 * warps * blocks <= 2048
            shared_bytes = 4 * warps * 8 * -(-m // 8) * 16 * tiles
            assert shared_bytes <= 48 << 10


def test_few_tiles_get_more_warps_each_and_more_rows_their_own_setting():
    settings = [(1, (16, 1, 1), (16, 1, 2)), (0, (4, 4, 4), (4, 2, 3))]
    assert setting_of(settings, 16 * 132, 8, processors=132) == (16, 1, 1)
    assert setting_of(settings, 16 * 132, 9, processors=132) == (16, 1, 2)
    assert setting_of(settings, 16 * 132 + 8, 1, processors=132) == (4, 4, 4)


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
def test_what_the_float8_product_does_not_take_is_refused_with_the_reason(monkeypatch, n, k, dtype, m, reason):
    monkeypatch.setattr(float8, "cuda_source_unsupported", lambda *_: None)
    fmt = get_format("float8-row/plain")
    found = fmt.unsupported_reason(fmt.kernel("rows"), LinearShape(n=n, k=k, bias=False, dtype=dtype), m, "cuda")
    assert found is None if reason is None else reason in found


def test_without_a_gpu_the_float8_product_says_so():
    fmt = get_format("float8-row/plain")
    shape = LinearShape(n=24, k=256, bias=False, dtype="bfloat16")
    assert "needs a CUDA GPU" in fmt.unsupported_reason(fmt.kernel("rows"), shape, 1, "cpu")


def test_the_compiler_is_told_what_the_float8_product_gives():
    stored = get_format("float8-row/plain").store(torch.randn(24, 128).bfloat16())
    x = torch.empty(2, 3, 128, dtype=torch.bfloat16, device="meta")
    y = float8_rows.float8_rows(x.reshape(-1, 128), stored.qdata.to("meta"), stored.scale.to("meta"), None)
    assert (y.shape, y.dtype, y.device.type) == ((6, 24), torch.bfloat16, "meta")
