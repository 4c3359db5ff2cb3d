"""Attention to keys and values in 8 bits, against float64 on the numbers that they stand for."""

import copy
import math
import warnings

import pytest
import torch
from runtime.generate.test_kv_codes import prompts, wide_llama

from autoquant.records import KV_CACHES
from autoquant.runtime.generate.attention import token_attention_codes
from autoquant.runtime.generate.kv_codes import Codes, codes_of, rounding_in_passes
from autoquant.runtime.prepare import prepare

pytestmark = pytest.mark.gpu


def normal(*size, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda").to(dtype)


def filled(length, share):
    return (torch.arange(length, device="cuda") < max(1, int(length * share)))[None, None, None]


def attend(q, keys, values, mask):
    float8 = keys.kind == "float8"
    held = (keys.codes, keys.scales, values.codes, values.scales)
    return token_attention_codes(q, *held, mask, q.shape[-1] ** -0.5, float8)


def expected(q, keys, values, mask):
    group = q.shape[1] // keys.codes.shape[1]
    k, v = (each.numbers(torch.float64).repeat_interleave(group, dim=1) for each in (keys, values))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0) @ v


def off(y, right):
    return ((y.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "h", "h_kv", "length", "d"),
    [
        (1, 32, 8, 512, 128),
        (3, 28, 4, 777, 128),
        (8, 16, 8, 4096, 128),
        (2, 8, 8, 33, 64),
        (1, 12, 4, 700, 80),
        (2, 8, 1, 2304, 256),
    ],
)
def test_it_gives_what_the_numbers_of_the_codes_give(kind, dtype, batch, h, h_kv, length, d):
    q = normal(batch, h, 1, d, dtype=dtype)
    small = 1e-3 if dtype == torch.float16 else 1.0  # times a weight, below what float16 holds
    keys = codes_of(normal(batch, h_kv, length, d, dtype=dtype, seed=1), kind)
    values = codes_of(normal(batch, h_kv, length, d, dtype=dtype, seed=2) * small, kind)
    for mask in (None, filled(length, 0.4), torch.rand(batch, h, 1, length, device="cuda") < 0.3):
        y = attend(q, keys, values, mask)
        most = 1e-5 if dtype == torch.float32 else 0.005
        assert off(y, expected(q, keys, values, mask)) < most
        assert torch.equal(y, attend(q, keys, values, mask)), "not the same twice"


@pytest.mark.parametrize("kind", KV_CACHES)
def test_what_lies_where_nothing_is_seen_has_no_effect_and_a_nan_that_is_seen_shows(kind):
    q, length = normal(1, 16, 1, 128), 2304
    keys, values = (codes_of(normal(1, 8, length, 128, seed=seed), kind) for seed in (1, 2))
    mask = filled(length, 0.4)
    right = attend(q, keys, values, mask)
    for each in (keys, values):
        each.codes[:, :, 921:], each.scales[:, :, 921:] = 0x7F, math.nan
    assert torch.equal(attend(q, keys, values, mask), right)
    values.scales[:, :, 7] = math.nan
    assert attend(q, keys, values, mask).isnan().all()


@pytest.mark.parametrize("kind", KV_CACHES)
def test_a_replayed_graph_sees_the_codes_that_were_written_since(kind):
    length = 2304
    q, mask = normal(2, 16, 1, 128), filled(length, 0.5).clone()
    keys, values = (codes_of(normal(2, 8, length, 128, seed=seed), kind) for seed in (1, 2))
    attend(q, keys, values, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attend(q, keys, values, mask)
    for step in range(4):
        new = codes_of(normal(2, 8, 1, 128, seed=step), kind)
        keys.codes[:, :, 1152 + step], keys.scales[:, :, 1152 + step] = (
            new.codes[:, :, 0],
            new.scales[:, :, 0],
        )
        mask[..., 1152 + step] = True
        graph.replay()
        assert off(y, expected(q, keys, values, mask)) < 0.005


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_replays_steps_over_codes(kind, dtype):
    model = wide_llama().to("cuda", dtype)
    ids = prompts(2, 70).cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prepare(model, kv_cache=kind)
        made = model.generate(
            ids,
            max_new_tokens=20,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        again = copy.deepcopy(model).generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(made.sequences, again)
    with torch.no_grad(), rounding_in_passes(model, kind):
        logits = model(made.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :].float()
    found = torch.stack(made.logits, dim=1)
    assert off(found, logits.double()) < (2e-3 if dtype == torch.float32 else 0.05)


def test_codes_are_half_as_large():
    numbers = normal(1, 8, 4096, 128)
    for kind in KV_CACHES:
        kept: Codes = codes_of(numbers, kind)
        assert kept.codes.nbytes + kept.scales.nbytes < 0.52 * numbers.nbytes
