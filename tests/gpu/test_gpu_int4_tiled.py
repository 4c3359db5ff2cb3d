"""The project's own CUDA kernels at the edges of what they take."""

import pytest
import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.formats.int4_tiled import (
    int4_rows,
    int4_unpack,
    multiply_int4_rows,
    unpack_int4_tiles,
)
from autoquant.candidates.joined import join
from autoquant.candidates.kernels import cuda_source
from autoquant.candidates.kernels.cuda_source import CudaKernel
from autoquant.candidates.routed import RoutedWeight
from autoquant.errors import CandidateError
from autoquant.records import RouteStep
from autoquant.runtime.compiled import compile_forward, ready_to_compile

pytestmark = pytest.mark.gpu


def normal(*size, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda").bfloat16()


def stored(n, k, group):
    return get_format(f"int4-g{group}/tiled").store(normal(n, k))


def off(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
@pytest.mark.parametrize(
    ("n", "k"), [(8, 128), (24, 384), (520, 1024), (1000, 2816), (9000, 256), (70000, 128)]
)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_product_of_a_few_rows_is_right_for_every_size(group, n, k, m):
    weight, x, bias = stored(n, k, group), normal(m, k, seed=1), normal(n, seed=2)
    numbers = weight.unpack(torch.float32).double()
    y = int4_rows(x, weight.qdata, weight.scale_and_zero, bias)
    assert off(y, x.double() @ numbers.t() + bias.double()) < 0.003
    assert torch.equal(y, int4_rows(x, weight.qdata, weight.scale_and_zero, bias)), (
        "not the same twice"
    )


@pytest.mark.parametrize(("n", "k"), [(8, 128), (24, 384), (1000, 2816)])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_unpacking_gives_the_stored_numbers(group, n, k):
    weight = stored(n, k, group)
    numbers = weight.unpack(torch.float32)
    parts = weight.qdata, weight.scale_and_zero, weight.row_scale
    assert off(int4_unpack(*parts, False), numbers.double()) < 0.002
    assert off(int4_unpack(*parts, True).float() * weight.row_scale, numbers.double()) < 0.03


@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_weights_are_multiplied_and_unpacked_like_others(group):
    weight, x = get_format(f"int4s-g{group}/tiled").store(normal(520, 1024)), normal(3, 1024)
    numbers = weight.unpack(torch.float32).double()
    y = int4_rows(x, weight.qdata, weight.scale_and_zero, None)
    assert off(y, x.double() @ numbers.t()) < 0.003
    parts = weight.qdata, weight.scale_and_zero, weight.row_scale
    assert off(int4_unpack(*parts, False), numbers) < 0.002


def test_large_activations_do_not_overflow():
    weight, x = stored(64, 1024, 128), normal(1, 1024) * 1e30
    y = int4_rows(x, weight.qdata, weight.scale_and_zero, None)
    assert off(y, x.double() @ weight.unpack(torch.float32).double().t()) < 0.003


@torch.no_grad()
def test_joined_weights_are_multiplied_as_one_in_a_compiled_model():
    route = (
        RouteStep(upper_m=16, kernel="rows"),
        RouteStep(upper_m=None, kernel="unpack-scaled-mm"),
    )

    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(512, 256, bias=False), nn.Linear(512, 128, bias=False)

        def forward(self, x):
            return torch.cat((self.q(x), self.k(x)), -1)

    model = Siblings().bfloat16().cuda()
    fmt = get_format("int4-g64/tiled")
    layers = (model.q, model.k)
    for layer, weight in zip(
        layers,
        join(
            [
                RoutedWeight.wrap(fmt.store(layer.weight), fmt.id, route, torch.bfloat16)
                for layer in layers
            ]
        ),
        strict=True,
    ):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    ready = ready_to_compile(model)
    run = compile_forward(lambda x: ready(x))
    for m in (1, 64):
        x = normal(1, m, 512, seed=3)
        assert off(run(x), model(x).double()) < 0.01


@pytest.mark.parametrize("rows", [(1,), (2, 3), (2, 1, 8), (0,)])
def test_the_operators_compute_what_their_implementations_do(rows):
    weight, x, bias = stored(72, 1024, 64), normal(*rows, 1024, seed=1), normal(72, seed=2)
    operands = weight.qdata, weight.scale_and_zero
    y = multiply_int4_rows(x, *operands, bias)
    assert y.shape == (*rows, 72) and torch.equal(y, int4_rows(x, *operands, bias))
    assert torch.equal(y, get_format("int4-g64/tiled").kernel("rows").linear(x, weight, bias))
    torch.library.opcheck(
        int4_rows, (x, *operands, bias), test_utils=("test_schema", "test_faketensor")
    )
    unpacked = unpack_int4_tiles(*operands, weight.row_scale, False)
    assert torch.equal(unpacked, int4_unpack(*operands, weight.row_scale, False))


def test_a_kernel_is_loaded_as_another_process_compiled_it(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    arguments = (
        "int4_tiled.cu",
        "int4_unpack",
        (("GROUP", 64), ("FLOAT8", 0)),
        torch.device("cuda", 0),
    )
    CudaKernel(*arguments)
    monkeypatch.setattr(cuda_source, "_compile", None)
    kernel = CudaKernel(*arguments)
    weight = stored(72, 1024, 64)
    out = torch.empty(72, 1024, device="cuda", dtype=torch.bfloat16)
    kernel.launch(
        9, 256, weight.qdata, weight.scale_and_zero, weight.row_scale, out, 72 * 1024 // 1024, 8
    )
    assert torch.equal(
        out, int4_unpack(weight.qdata, weight.scale_and_zero, weight.row_scale, False)
    )


def test_a_source_that_does_not_compile_is_one_error():
    with pytest.raises(CandidateError, match="does not compile"):
        CudaKernel(
            "int4_tiled.cu", "int4_rows", (("GROUP", 7), ("WARPS", 0)), torch.device("cuda", 0)
        )
