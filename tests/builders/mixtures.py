"""Tiny mixtures of experts of transformers, whose routers send tokens to all experts."""

from __future__ import annotations

import torch

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def mixtral(experts=4, width=64, inner=96):
    """Experts with weights `[experts, n, k]`."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES | {"hidden_size": width},
        intermediate_size=inner,
        num_local_experts=experts,
        num_experts_per_tok=min(2, experts),
    )
    return MixtralForCausalLM(config).bfloat16().eval()


def gpt_oss(experts=4):
    """Experts with weights `[experts, k, n]`, biases, and gates of their own."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        **SIZES,
        intermediate_size=96,
        head_dim=16,
        num_local_experts=experts,
        num_experts_per_tok=min(2, experts),
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = GptOssForCausalLM(config).bfloat16().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


KINDS = {"mixtral": mixtral, "gpt_oss": gpt_oss}
