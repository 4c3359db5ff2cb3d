"""Every format's numbers without its layout: the same bits, as integers or codes with scales."""

from __future__ import annotations

import pytest
import torch
from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor
from torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor import (
    Int4TilePackedTo4dTensor,
)

from autoquant.candidates import InputStatistics, get_format, known_formats
from autoquant.candidates.formats.int4 import rows_per_block
from autoquant.candidates.neutral import NeutralWeight

N, K = 64, 256
ONLY_ON_GPUS = ("tinygemm", "mslk", "cusparselt")
"""Layouts that their libraries pack on GPUs alone."""


def built_in():
    return [
        each.id
        for each in known_formats().values()
        if each.neutral
        and each.id.partition("/")[2] not in ONLY_ON_GPUS
        and (rows_per_block() or "cpu-packed" not in each.id)
    ]


@pytest.fixture(scope="module")
def weight():
    made = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05
    made[3] = 0  # no scale can be derived from it
    made[5, 7] = 3  # an outlier
    return made.to(torch.bfloat16)


@pytest.fixture(scope="module")
def inputs():
    return InputStatistics.of(torch.randn(4 * K, K, generator=torch.Generator().manual_seed(1)))


def neutral(name, weight, inputs=None):
    fmt = get_format(name)
    stored = fmt.store(weight, inputs)
    return fmt, stored, fmt.neutral(stored)


@pytest.mark.parametrize("name", built_in())
def test_the_neutral_form_has_the_numbers_of_the_format(name, weight, inputs):
    fmt, stored, found = neutral(name, weight, inputs)
    assert torch.equal(found.dequantize(), fmt.dequantize(stored))
    assert found.codes.shape == weight.shape


@pytest.mark.parametrize(
    ("name", "low", "zeros"),
    [
        ("int8-row/plain", -128, False),
        ("int4-g64/lanes", -8, True),
        ("int4-g64/tiled", -8, True),
        ("int4-g64/gemlite", 0, True),
        ("int4s-g64/lanes", -8, False),
        ("int4s-g64/tiled", -8, False),
        ("int3-g64/bit-planes", -4, False),
        ("int2-g32/bit-planes", -2, False),
    ],
)
def test_integers_begin_where_it_says_and_have_a_zero_where_the_format_has_one(
    name, low, zeros, weight
):
    _, _, found = neutral(name, weight)
    assert found.codes.dtype == torch.int8 and found.low == low
    assert low <= int(found.codes.min()) and int(found.codes.max()) < low + 2**found.bits
    assert (found.zero is not None) == zeros


def test_every_int4_layout_holds_the_same_integers(weight):
    _, _, lanes = neutral("int4-g32/lanes", weight)
    _, _, tiled = neutral("int4-g32/tiled", weight)
    _, _, gemlite = neutral("int4-g32/gemlite", weight)
    assert torch.equal(lanes.codes, tiled.codes)
    assert torch.equal(lanes.codes + 8, gemlite.codes)
    assert torch.equal(lanes.scale, tiled.scale) and torch.equal(lanes.zero, tiled.zero)


def test_a_last_group_in_part_is_kept(weight):
    fmt, stored, found = neutral("int4-g64/lanes", weight[:, :200].contiguous())
    assert found.codes.shape == (N, 200) and found.scale.shape == (N, 4)
    assert torch.equal(found.dequantize(), fmt.dequantize(stored))


def test_one_scale_of_a_tensor_is_there_for_each_row(weight):
    _, stored, found = neutral("float8-tensor/plain", weight)
    assert stored.scale.numel() == 1 and found.scale.shape == (N, 1)


def test_scales_of_blocks_are_in_the_order_of_the_columns(weight):
    column = weight.clone()
    column[:, 32:64] *= 4
    _, _, before = neutral("mxfp8/swizzled", weight)
    _, _, after = neutral("mxfp8/swizzled", column)
    moved = (after.scale.int() - before.scale.int()).ne(0).any(0).nonzero().flatten().tolist()
    assert moved == [1]


def test_codes_of_four_bits_are_those_of_e2m1():
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 16)
    ones = NeutralWeight(
        codes=codes, bits=4, scale=torch.full((1, 1), 127, dtype=torch.uint8), group=16
    )
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert ones.dequantize().tolist() == [[*positive, *(-each for each in positive)]]


def test_tiles_of_tinygemm_give_their_integers_without_a_gpu():
    made = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (2, 8, 32, 4), generator=made).int()
    both = torch.randn(1024 // 64, 16, 2, generator=made).to(torch.bfloat16)
    stored = Int4TilePackedTo4dTensor(words, both, [1, 64], torch.Size([16, 1024]))
    fmt = get_format("int4-g64/tinygemm")
    found = fmt.neutral(stored)
    assert torch.equal(found.dequantize(), fmt.dequantize(stored))
    assert found.codes.unique().tolist() == list(range(-8, 8)) and found.group == 64


def test_nibbles_of_mslk_are_signed():
    columns = torch.tensor([0x8F, 0x71], dtype=torch.uint8).view(torch.int8).expand(2, 2)
    scale, zero = torch.ones(1, 2), torch.full((1, 2), 0.5)
    stored = Int4Tensor(columns, scale, zero, [1, 4], torch.Size([2, 4]))
    found = get_format("int4-g32/mslk").neutral(stored)
    assert found.codes.tolist() == [[-1, -8, 1, 7]] * 2
    assert found.dequantize().tolist() == [[-0.5, -7.5, 1.5, 7.5]] * 2
