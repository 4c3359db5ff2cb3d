"""Quantized weights of experts on a GPU: multiplied at once, in a graph, in `generate`."""

import copy

import pytest
import torch
from builders.mixtures import mixtral
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.experts import ExpertsWeight, multiply_experts
from autoquant.candidates.linears import take_apart
from autoquant.delivery.kernel_check import KernelsInModel, check_kernels
from autoquant.records import RouteStep

pytestmark = pytest.mark.gpu

KERNELS = [
    (name, kernel.id)
    for name in ("int4-g32/tiled", "int4-g128/tiled", "int4s-g64/tiled", "float8-row/plain")
    for kernel in get_format(name).kernels
    if kernel.grouped is not None
]


def normal(*size, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda").bfloat16()


def off(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


def held(weight, name, kernel):
    fmt = get_format(name)
    route = (RouteStep(upper_m=None, kernel=kernel),)
    return ExpertsWeight.of(fmt.store(weight.flatten(0, 1)), fmt, route, weight.dtype, len(weight))


def ends_of(counts):
    return torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
@pytest.mark.parametrize(
    ("experts", "counts"),
    [
        (2, {1: 1}),
        (8, {1: 1, 6: 1}),
        (8, {0: 9, 3: 17, 7: 2}),
        (70, {31: 1, 32: 1, 69: 40}),
        (128, dict.fromkeys(range(0, 128, 5), 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("n", "k"), [(48, 128), (1008, 640)])
def test_each_row_is_multiplied_with_its_own_expert(name, kernel, experts, counts, n, k):
    weight = held(normal(experts, n, k), name, kernel)
    each = [counts.get(number, 0) for number in range(experts)]
    x, ends = normal(sum(each), k, seed=1), ends_of(each)
    numbers, start = weight.dequantize(), 0
    y = multiply_experts(x, weight, ends)
    rounded = "scaled" in kernel
    for number, count in enumerate(each):
        if count:
            expected = x[start : start + count].double() @ numbers[number].double().t()
            assert off(y[start : start + count], expected) < (0.06 if rounded else 0.004)
            start += count
    assert torch.equal(y, multiply_experts(x, weight, ends))


@pytest.mark.parametrize(
    ("name", "kernel"), [each for each in KERNELS if each[1] == "rows"], ids=str
)
def test_rows_of_no_expert_give_zeros(name, kernel):
    weight = held(normal(4, 48, 128), name, kernel)
    y = multiply_experts(normal(12, 128), weight, ends_of([2, 0, 3, 0]))
    assert bool((y[5:] == 0).all()) and bool((y[:5] != 0).any())


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_a_replayed_graph_follows_the_router(name, kernel):
    """The host never learns which rows are whose, so a graph computes for other ones too."""
    weight = held(normal(8, 64, 256), name, kernel)
    x, ends = normal(6, 256, seed=1), ends_of([0, 3, 0, 0, 3, 0, 0, 0])
    multiply_experts(x, weight, ends)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply_experts(x, weight, ends)
    ends.copy_(ends_of([1, 0, 0, 2, 0, 0, 0, 3]))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, multiply_experts(x, weight, ends))


def quantize_experts(module, name, kernel):
    for owner in module.modules():
        for key, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim == 3:
                weight = held(parameter.data, name, kernel)
                owner._parameters[key] = nn.Parameter(weight, requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("name", "kernel"), [("int4-g32/tiled", "rows"), ("float8-row/plain", "rows")]
)
@torch.no_grad()
def test_a_mixture_with_quantized_experts_computes_what_its_numbers_do(name, kernel):
    model = mixtral(width=256, inner=512).cuda()
    quantized = quantize_experts(copy.deepcopy(model), name, kernel)
    plain = copy.deepcopy(model)
    for owner, other in zip(plain.modules(), quantized.modules(), strict=True):
        for key, parameter in other.named_parameters(recurse=False):
            if isinstance(parameter.data, ExpertsWeight):
                numbers = parameter.data.dequantize().bfloat16()
                owner._parameters[key] = nn.Parameter(numbers, requires_grad=False)
    ids = torch.arange(3, 23, device="cuda").unsqueeze(0)
    expected = plain(ids).logits
    assert check_kernels(quantized) > 0
    with KernelsInModel(quantized):
        assert off(quantized(ids).logits, expected) < 0.02
    take_apart(quantized)
    assert off(quantized(ids).logits, expected) < 0.02
    # Compiled code rounds otherwise, which sends some tokens to other experts.
    usual = off(torch.compile(plain, dynamic=False)(ids).logits, expected)
    y = torch.compile(quantized, dynamic=False)(ids).logits
    assert off(y, expected) < max(0.03, 2 * usual)
