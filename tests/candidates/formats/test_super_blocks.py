"""int6 in super-blocks: how exact it is, how many bytes it takes, and who gets it."""

import io

import torch
import torch.nn.functional as F

from autoquant.candidates import get_format, select
from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.super_blocks import SuperBlockTensor
from autoquant.records import LinearShape

FORMAT = get_format("int6s-g16/super-blocks")


def weight_of(dtype=torch.float32):
    weight = torch.randn(24, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    weight[4, 16:] *= 1e-3  # the scales of a block differ by more than their integers can
    return weight


def test_numbers_lie_between_int5_and_int8_and_zeros_stay():
    weight = weight_of(torch.bfloat16)[5:]

    def error(name):
        fmt = get_format(name)
        return float((fmt.dequantize(fmt.store(weight)) - weight.float()).norm())

    assert error("int8-row/plain") < error(FORMAT.id) < 0.6 * error("int5-g32/bit-planes")
    assert not FORMAT.dequantize(FORMAT.store(weight_of()))[3].any()


def test_scales_that_are_too_small_for_their_block_cost_no_more_than_their_weights():
    weight = weight_of()
    found = FORMAT.dequantize(FORMAT.store(weight))
    assert bool(found.isfinite().all())
    assert float((found - weight)[4, 16:].norm()) < 0.5 * float(weight[4, 16:].norm())


def test_a_weight_takes_the_bits_it_says():
    assert stored_bytes(FORMAT.store(weight_of(torch.bfloat16))) * 8 == 24 * 512 * 6.5625


def test_the_product_is_that_of_the_numbers():
    stored = FORMAT.store(weight_of())
    x, bias = torch.randn(2, 5, 512), torch.randn(24)
    torch.testing.assert_close(
        FORMAT.kernels[0].linear(x, stored, bias), F.linear(x, FORMAT.dequantize(stored), bias)
    )


def test_a_stored_weight_survives_a_file_without_pickled_code():
    stored = FORMAT.store(weight_of(torch.bfloat16))
    file = io.BytesIO()
    torch.save({"weight": stored}, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)["weight"]
    assert type(again) is SuperBlockTensor and again.dtype == torch.bfloat16
    assert torch.equal(again.unpack(torch.float32), stored.unpack(torch.float32))


def test_blocks_that_do_not_divide_a_row_and_searches_that_do_not_ask_are_left_out():
    shape = LinearShape(n=8, k=384, bias=False, dtype="bfloat16")
    assert "divisible by 256" in FORMAT.unsupported(shape, 1, "cpu")
    assert FORMAT.id not in {each.format.id for each in select(["*"], "cpu")}
