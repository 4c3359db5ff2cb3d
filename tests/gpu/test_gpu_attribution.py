"""Where a step's time goes on a GPU, where it is the replay of a CUDA graph."""

import pytest
import torch
from torch import nn

from autoquant.records import Workload
from autoquant.runtime.attribution import attribute
from autoquant.runtime.phases import make_phases
from autoquant.runtime.steps import UNKNOWN

pytestmark = pytest.mark.gpu


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1024,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)


def test_the_kernels_of_a_replayed_step_are_told_by_layer():
    module = small_llama()
    phases = make_phases(
        module, "causal_lm", Workload.parse("prefill=64,decode=32"), device="cuda", compiled=True
    )
    for phase in phases.workload.phases:
        phases.reset(phase.name)
        phases.run(phase.name)
    linears = {name for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    for step in attribute(phases, module, {}, "cuda").values():
        times = step.layer_us({})
        assert set(times) == linears and all(time_us > 0 for time_us in times.values())
        assert step.glue_us().get(UNKNOWN, 0.0) < 0.02 * step.step_us
        total = sum(times.values()) + sum(step.glue_us().values()) + step.gaps_us()
        assert total == pytest.approx(step.step_us)
