"""int4 weights in the tiles of the project's own CUDA kernels.

What can be seen of them without a GPU.
"""

import pytest
import torch

from autoquant.candidates import InputStatistics, get_format, multiplied_numbers
from autoquant.candidates.base import W8_A8_FLOAT8_ROW, round_float8
from autoquant.candidates.formats import int4_tiled
from autoquant.candidates.formats.int4_rounding import tinygemm_rounding
from autoquant.candidates.formats.int4_tiled import Int4TiledTensor
from autoquant.candidates.joined import join, whole_of
from autoquant.candidates.routed import RoutedWeight
from autoquant.records import LinearShape, RouteStep

N, K = 24, 256


def normal(n=N, seed=0):
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed)).bfloat16()


def by_hand(q, scale, zero, group):
    return (
        (q.reshape(len(q), -1, group) - 8) * scale.float()[..., None] + zero.float()[..., None]
    ).reshape(q.shape)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_tiles_hold_the_rounded_numbers_and_each_rows_largest(group):
    q, scale, zero = tinygemm_rounding(normal(), group)
    stored = get_format(f"int4-g{group}/tiled").store(normal())
    numbers = by_hand(q, scale, zero, group)
    assert torch.equal(get_format(f"int4-g{group}/tiled").dequantize(stored), numbers)
    assert stored.group == group
    torch.testing.assert_close(stored.row_scale, numbers.abs().amax(1, keepdim=True) / 448)


@pytest.mark.parametrize("rounding", ["", "-hqq", "-clip", "-gptq"])
def test_symmetric_tiles_hold_the_numbers_of_symmetric_lanes(rounding):
    weight, x = normal(n=48), torch.randn(512, K, generator=torch.Generator().manual_seed(1))
    tiles, lanes = (
        fmt.dequantize(fmt.store(weight, InputStatistics(x.t() @ x)))
        for fmt in (get_format(f"int4s-g64{rounding}/{name}") for name in ("tiled", "lanes"))
    )
    assert torch.equal(tiles, lanes)


def test_a_word_holds_eight_neighbouring_columns_even_ones_below_odd_ones():
    q = torch.zeros(8, 128, dtype=torch.int32)
    row, word, lane = 5, 2, 3
    q[row, 32 * word + 8 * lane : 32 * word + 8 * lane + 8] = torch.arange(1, 9, dtype=torch.int32)
    ones = torch.ones(8, 1, dtype=torch.bfloat16)
    words = Int4TiledTensor.pack(q, ones, ones).qdata.reshape(8, 4, 4)
    assert words[row, lane, word].item() & 0xFFFFFFFF == 0x86427531
    assert int(words.count_nonzero()) == 1


def test_weights_behind_one_another_are_one_weight():
    fmt = get_format("int4-g64/tiled")
    route = (RouteStep(upper_m=None, kernel="unpack-matmul"),)
    weights = [
        RoutedWeight.wrap(fmt.store(normal(n, seed=n)), fmt.id, route, torch.bfloat16)
        for n in (24, 8, 40)
    ]
    joined = join(weights)
    whole = whole_of(joined[1])
    assert whole.start == 24
    together = torch.cat([weight.dequantize() for weight in weights])
    assert torch.equal(fmt.dequantize(Int4TiledTensor(*whole.parts)), together)


def test_unpacked_to_float8_the_numbers_are_rounded_again():
    fmt = get_format("int4-g32/tiled")
    stored = fmt.store(normal())
    values, scale = round_float8(fmt.dequantize(stored), per_row=True)
    assert torch.equal(multiplied_numbers(fmt, stored, W8_A8_FLOAT8_ROW), values.float() * scale)
    assert torch.equal(multiplied_numbers(fmt, stored, "a16"), fmt.dequantize(stored))


@pytest.mark.parametrize(
    ("n", "k", "dtype", "reason"),
    [
        (20, 256, "bfloat16", "n divisible by 8 and k by 128, not 20x256"),
        (24, 192, "bfloat16", "n divisible by 8 and k by 128, not 24x192"),
        (24, 256, "float32", "bfloat16 activations, not float32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_reason(monkeypatch, n, k, dtype, reason):
    monkeypatch.setattr(int4_tiled, "cuda_source_unsupported", lambda *_: None)
    shape = LinearShape(n=n, k=k, bias=False, dtype=dtype)
    assert reason in get_format("int4-g64/tiled").unsupported(shape, 1, "cuda")


def test_without_a_gpu_that_is_the_reason():
    shape = LinearShape(n=24, k=256, bias=False, dtype="bfloat16")
    assert (
        get_format("int4-g64/tiled").unsupported(shape, 1, "cpu")
        == "this int4 layout needs a CUDA GPU"
    )
