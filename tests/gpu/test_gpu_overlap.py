"""Kernels in a CUDA graph that start while the ones before them end: every result is what it is one after the other."""

import pytest
import torch

from autoquant.candidates import few_rows, get_format
from autoquant.candidates.float8_rows import float8_rows
from autoquant.candidates.int4_tiled import int4_rows
from autoquant.profiler import norms
from autoquant.profiler.norms import add_rms_norm, rms_norm
from autoquant.runtime import attention
from autoquant.runtime.attention import token_attention

pytestmark = pytest.mark.gpu

LAYERS, REPLAYS, WIDTH = 24, 50, 1024


def normal(*size, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda").bfloat16()


def products(name):
    """Products with one weight each, as functions of x `[m, WIDTH]`, which they make neither larger nor smaller."""
    weights = [get_format(name).store(normal(WIDTH, WIDTH, seed=seed) / 32) for seed in range(LAYERS)]
    if name.startswith("int4"):
        return [lambda x, w=weight: int4_rows(x, w.qdata, w.scale_and_zero, None) for weight in weights]
    return [lambda x, w=weight: float8_rows(x, w.qdata, w.scale, None) for weight in weights]


def captured(step, x):
    for _ in range(2):
        step(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x)
    return graph, y


@pytest.mark.parametrize("between", ["nothing", "a kernel", "a sum", "a norm", "a norm of a sum"])
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("name", ["int4-g128/tiled", "float8-row/plain"])
@pytest.mark.parametrize("overlap", [True, False])
def test_products_in_a_graph_read_what_the_kernels_before_wrote(name, m, between, overlap, monkeypatch):
    monkeypatch.setattr(few_rows, "OVERLAP", overlap)
    monkeypatch.setattr(norms, "OVERLAP", overlap)
    layers, x, weight = products(name), normal(m, WIDTH), normal(WIDTH) / 32

    def step(x):
        total = x
        for layer in layers:
            y = layer(x)
            if between == "nothing":
                x = y
            elif between == "a kernel":
                x = torch.tanh(y)
            elif between == "a sum":
                x = (x + y) / 32
            elif between == "a norm":
                x = rms_norm(y, weight, 1e-5)
            else:
                total, x = add_rms_norm(total, y, weight, 1e-5)
        return x

    graph, y = captured(step, x)
    for replay in range(REPLAYS):
        x.copy_(normal(m, WIDTH, seed=100 + replay))
        graph.replay()
        assert torch.equal(y, step(x)), f"replay {replay}"


def test_attention_between_products(monkeypatch):
    """The cache is written by the kernel before it, in place, and other layers reuse its memory."""
    layers, (heads, width, length) = products("int4-g128/tiled"), (8, 128, 2304)
    k, v = normal(1, 2, length, width, seed=1), normal(1, 2, length, width, seed=2)
    at = torch.zeros(1, dtype=torch.long, device="cuda")
    mask = torch.arange(length, device="cuda")[None, None, None] <= at

    def step(x):
        for layer in layers:
            y = layer(x) / 32
            k.index_copy_(2, at, y.view(1, heads, 1, width)[:, :2])
            v.index_copy_(2, at, y.view(1, heads, 1, width)[:, 2:4])
            x = token_attention(y.view(1, heads, 1, width), k, v, mask, width**-0.5).view(1, WIDTH)
        return x

    x = normal(1, WIDTH)
    monkeypatch.setattr(attention, "OVERLAP", True)
    graph, y = captured(step, x)
    for replay in range(REPLAYS):
        x.copy_(normal(1, WIDTH, seed=100 + replay))
        at.fill_(replay * 40)
        mask.copy_(torch.arange(length, device="cuda")[None, None, None] <= at)
        graph.replay()
        result = y.clone()
        assert torch.equal(result, step(x)), f"replay {replay}"
