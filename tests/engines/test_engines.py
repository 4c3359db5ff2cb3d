"""What an engine reads, what it computes as one, and what it lacks on a device."""

from __future__ import annotations

import pytest

from autoquant.engines import engine
from autoquant.errors import ConstraintError
from autoquant.records import LinearShape


def shape(n=64, k=128):
    return LinearShape(n=n, k=k, bias=False, dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("vllm", "compressed-tensors"),
        ("sglang", "compressed-tensors"),
        ("llama.cpp", "gguf"),
        ("transformers", "transformers"),
    ],
)
def test_every_engine_reads_one_target(name, read):
    assert engine(name).target.name == read


def test_what_the_target_cannot_hold_is_refused_with_the_nearest():
    refused = engine("vllm").refuses("int4-g64", "a16", shape())
    assert refused is not None and refused.endswith("nearest: int4s-g64")
    assert engine("vllm").refuses("int8-row", "a8-row", shape()) is None
    assert engine("vllm").refuses("bfloat16", "a16", shape()) is None


def test_layers_that_vllm_computes_as_one_are_grouped():
    names = [
        f"model.layers.{b}.{leaf}"
        for b in (0, 1)
        for leaf in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    assert engine("vllm").fused([*names, "lm_head"]) == [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"),
        ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"),
    ]  # fmt: skip
    assert engine("llama.cpp").fused(names) == []


def test_all_experts_of_a_layer_are_one_group():
    names = [
        f"model.layers.0.mlp.experts.{e}.{leaf}"
        for e in (0, 1)
        for leaf in ("up_proj", "down_proj")
    ]
    assert engine("sglang").fused(names) == [tuple(names)]


def test_a_tensor_scale_cannot_be_shared_by_layers_that_are_computed_as_one():
    assert engine("vllm").refuses("nvfp4", "a16", shape()) is None
    assert "one nvfp4 tensor scale" in engine("vllm").refuses("nvfp4", "a16", shape(), fused=True)


@pytest.mark.parametrize(
    ("values", "numerics", "works"),
    [
        ("int8-row", "a8-row", True),
        ("int8-row", "a16", False),
        ("float8-row", "a8-float8-row", True),
        ("int4s-g32", "a16", True),
        ("int3-g32", "a16", False),
        ("mxfp4", "a-mxfp4", False),
        ("bfloat16", "a16", True),
    ],
)
def test_vllm_on_a_cpu_lacks_kernels_that_it_has_elsewhere(values, numerics, works):
    refused = engine("vllm").refuses(values, numerics, shape(), device="cpu")
    assert (refused is None) == works
    assert engine("vllm").refuses(values, numerics, shape(), device="cuda") is None


def test_vllm_on_a_cpu_needs_32_rows_of_int4():
    assert "n divisible by 32" in engine("vllm").refuses(
        "int4s-g32", "a16", shape(n=48), device="cpu"
    )


def test_an_unknown_engine_is_refused_with_a_hint():
    with pytest.raises(ConstraintError, match="did you mean vllm"):
        engine("vlm")
