"""Attention for one token.

What models of transformers compute with it is what they computed without.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from autoquant.candidates.kernels.cpu_source import cpu_kernels_work
from autoquant.runtime.generate import attention
from autoquant.runtime.generate.attention import splits_of, token_attention, use_token_attention
from autoquant.runtime.parts import as_if_compiled

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
PROMPT, LENGTH = 5, 12


def tiny(name: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name.partition("-")[0], **SIZES, **MODELS[name], **changes
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def calls(monkeypatch):
    """Attend with the operator, as in compiled code.

    Gives the shapes of the keys that it was called with.
    """
    seen = []

    def counted(q, k, v, mask, scale):
        seen.append(tuple(k.shape))
        return token_attention(q, k, v, mask, scale)

    monkeypatch.setattr(attention, "token_attention", counted)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    return seen


@torch.no_grad()
def logits_of(model, ids, padding=None, static=True):
    """Logits of a prompt and of each further token."""
    cache = (
        transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
        if static
        else transformers.DynamicCache()
    )
    steps = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    found, end = [], 0
    for step in steps:
        positions = torch.arange(end, end := end + step.shape[1]).expand(len(ids), -1)
        seen = None if padding is None else padding[:, :end]
        found.append(
            model(step, attention_mask=seen, position_ids=positions, past_key_values=cache).logits
        )
    return torch.cat(found, dim=1)


def ids_of(batch: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_did(name, calls):
    model = tiny(name)
    before = logits_of(model, ids_of(2))
    assert use_token_attention(model) is None
    after = logits_of(model, ids_of(2))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert len(calls) == (LENGTH - PROMPT) * 2, "not every step of every layer"


@pytest.mark.parametrize("static", [True, False])
def test_padding_stays_unseen(static, calls):
    model, padding = tiny("llama"), torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, :3] = 0
    before = logits_of(model, ids_of(2), padding, static)
    assert use_token_attention(model) is None
    torch.testing.assert_close(
        logits_of(model, ids_of(2), padding, static), before, rtol=1e-4, atol=1e-5
    )
    assert calls


def test_greedy_text_is_the_same(calls):
    model = tiny("llama")
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    before = model.generate(ids_of(2), **options)
    assert use_token_attention(model) is None
    assert torch.equal(model.generate(ids_of(2), **options), before)
    assert calls


def test_a_prompt_and_training_are_transformers_own(calls):
    model = tiny("llama")
    assert use_token_attention(model) is None
    model(ids_of(2))
    model(ids_of(2)[:, :1])  # one token, and its gradient wanted
    assert not calls


@pytest.mark.parametrize("compiled", [False, True])
def test_where_nothing_is_compiled_or_there_are_no_kernels_all_stays(compiled, monkeypatch):
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", compiled)
    monkeypatch.setattr(attention, "cpu_kernels_work", lambda: not compiled)
    monkeypatch.setattr(attention, "token_attention", None)
    model = tiny("llama")
    before = logits_of(model, ids_of(2))
    assert use_token_attention(model) is None
    assert torch.equal(logits_of(model, ids_of(2)), before)


def test_saving_keeps_the_choice_out(tmp_path):
    model = tiny("llama")
    assert use_token_attention(model) is None
    model.save_pretrained(tmp_path)
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation
        == "sdpa"
    )


@pytest.mark.parametrize("compiling", [True, False])
def test_a_block_that_is_traced_holds_the_operator(compiling):
    model = tiny("llama")
    assert use_token_attention(model) is None
    block, angle = model.model.layers[0], torch.ones(1, 1, 16)
    with torch.no_grad(), as_if_compiled(compiling):
        graph = make_fx(lambda x: block(x, None, position_embeddings=(angle, angle)))(
            torch.ones(1, 1, 64)
        )
    calls = [
        node
        for node in graph.graph.nodes
        if node.target == torch.ops.autoquant.token_attention.default
    ]
    assert len(calls) == compiling


def test_a_copy_attends_the_same_way():
    model = tiny("llama")
    assert use_token_attention(model) is None
    assert use_token_attention(model) is None
    assert copy.deepcopy(model).config._attn_implementation == "autoquant"


def test_models_that_cannot_say_why():
    assert use_token_attention(nn.Linear(2, 2)) == "it is no model of transformers"
    assert (
        use_token_attention(tiny("llama", attn_implementation="eager"))
        == "its attention is eager, not sdpa"
    )


def test_a_head_that_sees_nothing_gives_zeros():
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16)
    assert token_attention(q, k, k, torch.zeros(1, 1, 1, 9, dtype=torch.bool), 1.0).eq(0).all()


def test_the_operator_is_well_formed():
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 32)
    torch.library.opcheck(
        token_attention, (q, k, v, torch.ones(2, 1, 1, 9, dtype=torch.bool), 0.25)
    )
    torch.library.opcheck(token_attention, (q, k, v, None, 0.25))


def test_a_cache_is_shared_by_as_many_programs_as_run_at_a_time():
    assert splits_of(groups=8, blocks=36, processors=132) == 36
    assert splits_of(groups=128, blocks=36, processors=132) == 3
    assert splits_of(groups=1, blocks=512, processors=132) == 64
    assert splits_of(groups=1024, blocks=36, processors=132) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "width", "v_width"),
    [
        (1, 9, 3, 768, 64, 64),
        (2, 8, 8, 100, 128, 64),
        (1, 4, 1, 33, 16, 80),
        (3, 2, 2, 513, 96, 96),
    ],
)
def test_a_cpu_attends_as_pytorch_does(batch, heads, kv_heads, length, width, v_width, dtype):
    assert cpu_kernels_work()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k = normal(batch, heads, 1, width), normal(batch, kv_heads, length, width)
    v = normal(batch, length, kv_heads, v_width).transpose(1, 2)
    prefix = (torch.arange(length) < length * 2 // 3)[None, None, None]
    each = torch.rand(batch, heads, 1, length, generator=generator) > 0.5
    for mask in (None, prefix, each):
        y = token_attention(q, k, v, mask, width**-0.5)
        expected = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=mask, enable_gqa=True
        )
        error = ((y.float() - expected).norm() / expected.norm()).item()
        assert error < (1e-5 if dtype == torch.float32 else 4e-3)


def test_large_scores_overflow_nothing_and_a_head_that_sees_nothing_gives_zeros():
    assert cpu_kernels_work()
    q, k = torch.full((1, 2, 1, 16), 300.0), torch.full((1, 1, 70, 16), 300.0)
    k[:, :, 5] *= -1
    v = torch.ones(1, 1, 70, 16)
    mask = torch.ones(1, 2, 1, 70, dtype=torch.bool)
    mask[:, 1] = False
    y = token_attention(q, k, v, mask, 1.0)
    assert torch.equal(y[:, 0], torch.ones_like(y[:, 0]))
    assert torch.equal(y[:, 1], torch.zeros_like(y[:, 1]))


@pytest.mark.parametrize(
    "changed",
    [
        {"q": torch.ones(1, 4, 1, 32)},
        {"v": torch.ones(1, 2, 9, 16)},
        {"k": torch.ones(1, 3, 8, 16), "v": torch.ones(1, 3, 8, 16)},
        {"mask": torch.ones(1, 1, 1, 7, dtype=torch.bool)},
        {"mask": torch.ones(1, 1, 1, 8)},
    ],
)
def test_heads_that_do_not_fit_are_refused(changed):
    assert cpu_kernels_work()
    given = {
        "q": torch.ones(1, 4, 1, 16),
        "k": torch.ones(1, 2, 8, 16),
        "v": torch.ones(1, 2, 8, 16),
        "mask": None,
    } | changed
    with pytest.raises(RuntimeError, match="fit"):
        token_attention(*given.values(), 1.0)
