"""Norms of a few rows: models' norms are found, and take the addition before them along."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from autoquant.profiler import norms
from autoquant.profiler.norms import add_rms_norm, join_additions, rms_norm, use_own_norms
from autoquant.profiler.parts import told_that_it_is_compiled


@pytest.fixture
def on_a_cpu_too(monkeypatch):
    monkeypatch.setattr(norms, "_DEVICES", ("cuda", "cpu"))


def own(module: nn.Module) -> nn.Module:
    use_own_norms(module)
    return module


def traced(function, *inputs):
    with torch.no_grad(), told_that_it_is_compiled():
        return make_fx(function)(*inputs)


def targets(graph) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


NORM, ADD_NORM = torch.ops.autoquant.rms_norm.default, torch.ops.autoquant.add_rms_norm.default


@pytest.mark.parametrize("kind", [LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_computes_what_it_did(kind, dtype, on_a_cpu_too):
    norm, x = kind(64, eps=1e-5).to(dtype), torch.randn(2, 3, 64).to(dtype)
    nn.init.normal_(norm.weight)
    expected = norm(x)
    graph = traced(own(norm), x)
    assert targets(graph) == [NORM]
    assert torch.equal(graph(x), expected)


@pytest.mark.parametrize(
    ("norm", "x"),
    [
        (LlamaRMSNorm(64), torch.randn(1, 17, 64)),
        (LlamaRMSNorm(64).bfloat16(), torch.randn(1, 1, 64)),
        (Gemma3RMSNorm(64), torch.randn(1, 1, 64)),
        (nn.RMSNorm(64), torch.randn(1, 1, 64)),
        (Qwen3RMSNorm(64), torch.randn(1, 1, 8, 64)),
    ],
)
def test_other_norms_many_rows_heads_and_mixed_dtypes_stay(norm, x, on_a_cpu_too):
    expected = norm(x)
    graph = traced(own(norm), x)
    assert NORM not in targets(graph)
    assert torch.equal(graph(x), expected)


def test_code_that_is_not_compiled_stays(on_a_cpu_too, monkeypatch):
    monkeypatch.setattr(norms, "rms_norm", None)
    norm, x = LlamaRMSNorm(64), torch.randn(1, 1, 64)
    with torch.no_grad():
        assert torch.equal(own(norm)(x), LlamaRMSNorm(64)(x))


def test_a_block_makes_its_sums_in_its_norms(on_a_cpu_too):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = "sdpa"
    block = transformers.models.llama.modeling_llama.LlamaDecoderLayer(config, 0).eval()
    x, angle = torch.randn(1, 1, 64), torch.ones(1, 1, 16)

    def call(x):
        return block(x, None, position_embeddings=(angle, angle))

    expected = call(x)
    use_own_norms(block)
    graph = traced(call, x)
    assert targets(graph).count(NORM) == 2
    join_additions(graph)
    graph.graph.lint()
    assert (targets(graph).count(NORM), targets(graph).count(ADD_NORM)) == (1, 1)
    torch.testing.assert_close(graph(x), expected)


def test_a_sum_that_is_needed_before_its_norm_stays():
    def early(x, y, weight):
        total = x + y
        doubled = total * 2
        return rms_norm(total, weight, 1e-5), doubled

    def broadcast(x, y, weight):
        return rms_norm(x + y[:1], weight, 1e-5)

    x, y, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    for function in (early, broadcast):
        graph = traced(function, x, y, weight)
        before = targets(graph)
        join_additions(graph)
        assert targets(graph) == before


def test_the_operators_are_well_formed():
    x, weight = torch.randn(2, 1, 8), torch.randn(8)
    torch.library.opcheck(rms_norm, (x, weight, 1e-5))
    torch.library.opcheck(add_rms_norm, (x, x + 1, weight, 1e-5))
