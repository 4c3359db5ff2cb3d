"""The project's own attention for one token, against float64, and replayed."""

import math

import pytest
import torch

from autoquant.candidates import get_format
from autoquant.candidates.formats.int4_tiled import int4_rows
from autoquant.runtime.generate.attention import token_attention

pytestmark = pytest.mark.gpu


def normal(*size, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda").to(dtype)


def inputs(b, h, h_kv, length, d=128, d_v=None, dtype=torch.bfloat16):
    """Query, keys and values as models have them.

    Heads of a query lie behind one another, the cache is as it is kept.
    """
    q = normal(b, 1, h, d, dtype=dtype).transpose(1, 2)
    return (
        q,
        normal(b, h_kv, length, d, dtype=dtype, seed=1),
        normal(b, h_kv, length, d_v or d, dtype=dtype, seed=2),
    )


def filled(length, share, batch=1, padding=0):
    """A mask over a cache of which a share is filled.

    Sample i begins with i * padding tokens that are not seen.
    """
    at, first = (
        torch.arange(length, device="cuda"),
        padding * torch.arange(batch, device="cuda")[:, None],
    )
    return ((at < max(1, int(length * share))) & (at >= first))[:, None, None, :]


def expected(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = (tensor.double().repeat_interleave(group, dim=1) for tensor in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0) @ v


def off(y, right):
    return ((y.double() - right).norm() / right.norm()).item()


def attend(q, k, v, mask):
    return token_attention(q, k, v, mask, q.shape[-1] ** -0.5)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0, None])
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(
    ("h", "h_kv", "length"),
    [(32, 8, 512), (32, 8, 2304), (8, 8, 1000), (28, 4, 777), (16, 1, 4096)],
)
def test_the_result_is_right_for_every_cache(h, h_kv, length, batch, share):
    q, k, v = inputs(batch, h, h_kv, length)
    mask = None if share is None else filled(length, share)
    y = attend(q, k, v, mask)
    assert y.shape == (batch, h, 1, 128)
    assert off(y, expected(q, k, v, mask)) < 0.005
    assert torch.equal(y, attend(q, k, v, mask)), "not the same twice"


@pytest.mark.parametrize("length", [1, 15, 16384, 32768])
def test_short_and_long_caches(length):
    q, k, v = inputs(1, 32, 8, length)
    mask = filled(length, 0.9)
    assert off(attend(q, k, v, mask), expected(q, k, v, mask)) < 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("d", "d_v"), [(16, 16), (64, 64), (80, 80), (96, 96), (128, 64), (192, 128), (256, 256)]
)
def test_sizes_of_a_head(d, d_v, dtype):
    q, k, v = inputs(2, 12, 4, 700, d, d_v, dtype)
    mask = filled(700, 0.6, batch=2, padding=9)
    most = 1e-5 if dtype == torch.float32 else 0.005
    assert off(attend(q, k, v, mask), expected(q, k, v, mask)) < most


def test_masks_of_each_sample_and_each_head():
    q, k, v = inputs(4, 8, 2, 900)
    generator = torch.Generator("cuda").manual_seed(3)
    for mask in (
        filled(900, 0.7, batch=4, padding=50),
        torch.rand(4, 8, 1, 900, generator=generator, device="cuda") < 0.02,
        torch.rand(1, 8, 1, 900, generator=generator, device="cuda") < 0.5,
        filled(900, 1.0) & (torch.arange(900, device="cuda") >= 800),  # a window
        filled(900, 0.5).expand(4, 1, 1, 900),
    ):
        assert off(attend(q, k, v, mask), expected(q, k, v, mask)) < 0.005


@pytest.mark.parametrize("length", [40, 2304])
def test_a_head_that_sees_nothing_gives_zeros(length):
    q, k, v = inputs(2, 8, 2, length)
    mask = filled(length, 1.0).repeat(2, 8, 1, 1)
    mask[0, 3] = False
    mask[1] = False
    y = attend(q, k, v, mask)
    assert y[0, 3].eq(0).all()
    assert y[1].eq(0).all()
    assert off(y, expected(q, k, v, mask)) < 0.005


def test_what_lies_where_nothing_is_seen_has_no_effect():
    q, k, v = inputs(1, 32, 8, 2304)
    mask = filled(2304, 0.4)
    right = attend(q, k, v, mask)
    k[:, :, 921:], v[:, :, 921:] = math.nan, math.inf
    assert torch.equal(attend(q, k, v, mask), right)


@pytest.mark.parametrize("length", [40, 2304])
def test_a_nan_that_is_seen_is_not_hidden(length):
    q, k, v = inputs(1, 4, 1, length)
    k[:, :, 7, 5] = math.nan
    assert attend(q, k, v, filled(length, 0.5)).isnan().all()


def test_keys_and_values_of_any_strides():
    q, k, v = inputs(2, 8, 2, 300)
    others = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (k, v)]
    columns = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (k, v)]
    mask = filled(300, 0.5)
    right = attend(q, k, v, mask)
    assert torch.equal(attend(q, *others, mask), right)
    assert torch.equal(attend(q.contiguous(), *columns, mask), right)


def test_large_scores_do_not_overflow():
    q, k, v = inputs(1, 8, 8, 640, dtype=torch.float32)
    assert off(attend(q * 300, k, v, None), expected(q * 300, k, v, None)) < 1e-4


def test_a_replayed_graph_sees_what_was_written_since():
    """Cache and mask change between replays, as they do in a step."""
    q, k, v = inputs(2, 32, 8, 2304)
    mask = filled(2304, 0.5).clone()
    attend(q, k, v, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = q
        for _ in range(3):
            y = attend(y + 1, k, v, mask)
    for step in range(4):
        k[:, :, 1152 + step], mask[..., 1152 + step] = normal(2, 8, 128, seed=step), True
        graph.replay()
        right = q
        for _ in range(3):
            right = attend(right + 1, k, v, mask)
        assert torch.equal(y, right)
        assert off(attend(q, k, v, mask), expected(q, k, v, mask)) < 0.005


def test_a_replayed_graph_of_layers_computes_what_they_do_one_after_another():
    """Each layer's cache is written in place by the kernel before its attention, at a position that
    moves.
    """
    h, d, length = 8, 128, 2304
    width, at = h * d, torch.zeros(1, dtype=torch.long, device="cuda")
    weights = [
        get_format("int4-g128/tiled").store(normal(width, width, seed=seed) / 32)
        for seed in range(8)
    ]
    caches = [
        [normal(1, 2, length, d, seed=2 * layer + which) for which in (0, 1)] for layer in range(8)
    ]

    def step(x):
        mask = torch.arange(length, device="cuda")[None, None, None] <= at
        for weight, (k, v) in zip(weights, caches, strict=True):
            y = int4_rows(x, weight.qdata, weight.scale_and_zero, None).view(1, h, 1, d)
            k.index_copy_(2, at, y[:, :2])
            v.index_copy_(2, at, y[:, 2:4])
            x = attend(y, k, v, mask).view(1, width)
        return x

    x = normal(1, width)
    step(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x)
    for replay in range(20):
        x.copy_(normal(1, width, seed=100 + replay))
        at.fill_(replay * 100)
        graph.replay()
        assert y.isfinite().all() and y.abs().max() > 1e-3
        assert torch.equal(y, step(x)), f"replay {replay}"


def test_it_compiles():
    q, k, v = inputs(1, 32, 8, 512)
    mask = filled(512, 0.5)
    compiled = torch.compile(lambda q, k, v, mask: attend(q * 2, k, v, mask) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, mask), attend(q * 2, k, v, mask) + 1)
