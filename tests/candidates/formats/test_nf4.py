"""NF4: its levels, the nearest of them, and its bytes."""

import io

import torch

from autoquant.candidates import get_format, select
from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.nf4 import LEVELS, NormalFloatTensor

N, K = 24, 192
FORMAT = get_format("nf4-g64/packed")


def weight_of(dtype=torch.bfloat16):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    return weight


def test_numbers_are_the_nearest_levels_of_each_group():
    weight = weight_of(torch.float32)
    groups = weight.reshape(N, -1, 64)
    found = FORMAT.dequantize(FORMAT.store(weight)).reshape(N, -1, 64)
    levels = torch.tensor(LEVELS) * groups.abs().amax(-1, keepdim=True).unsqueeze(-1)
    nearest = (groups.unsqueeze(-1) - levels).abs().amin(-1)
    torch.testing.assert_close((groups - found).abs(), nearest, atol=1e-6, rtol=1e-5)
    assert not found[:, :, :][3].any()


def test_levels_stand_for_about_as_many_normal_numbers_each():
    scaled = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1))
    weight = scaled / scaled.abs().amax(1, keepdim=True)
    found = FORMAT.dequantize(FORMAT.store(weight))
    shares = [(found == level).float().mean().item() for level in LEVELS[1:-1]]
    assert min(shares) > 0.02 and max(shares) < 0.12


def test_it_is_closer_to_normal_weights_than_integers_of_as_many_bits():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)).bfloat16()

    def error(name):
        fmt = get_format(name)
        return (fmt.dequantize(fmt.store(weight)) - weight.float()).norm()

    assert error("nf4-g64/packed") < error("int4s-g64/lanes")


def test_a_weight_takes_four_bits_and_a_scale_for_each_group():
    assert stored_bytes(FORMAT.store(weight_of())) * 8 == N * K * (4 + 16 / 64)


def test_a_stored_weight_survives_a_file_without_pickled_code():
    stored = FORMAT.store(weight_of())
    file = io.BytesIO()
    torch.save({"weight": stored}, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)["weight"]
    assert type(again) is NormalFloatTensor
    assert torch.equal(FORMAT.dequantize(again), FORMAT.dequantize(stored))


def test_a_search_gets_it_only_by_name():
    assert not any(each.format is FORMAT for each in select(["*"], "cpu"))
    assert any(each.format is FORMAT for each in select(["nf4*"], "cpu"))
