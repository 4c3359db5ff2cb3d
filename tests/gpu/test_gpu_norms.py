"""The project's own norms of a few rows, against float64."""

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from autoquant.profiler.compiled import ready_to_compile
from autoquant.profiler.norms import add_rms_norm, rms_norm
from autoquant.profiler.parts import compile_parts, told_that_it_is_compiled

pytestmark = pytest.mark.gpu


def normal(*size, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("width", [64, 576, 4096, 5120, 16384])
def test_a_norm_is_right_for_every_size(width, rows, dtype):
    x, other, weight = (
        normal(*size, width, dtype=dtype, seed=seed) for seed, size in enumerate([(rows, 1), (rows, 1), ()])
    )
    most = 1e-5 if dtype == torch.float32 else 2e-2  # of the largest number: rounded twice, as by the model itself
    for total, given in ((x, rms_norm(x, weight, 1e-5)), (x + other, add_rms_norm(x, other, weight, 1e-5)[1])):
        exact = total.double()
        right = weight.double() * exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-5)
        assert (given.double() - right).abs().max() <= most * right.abs().max()
    assert torch.equal(add_rms_norm(x, other, weight, 1e-5)[0], x + other)


def test_it_rounds_as_the_model_does():
    norm = LlamaRMSNorm(4096, eps=1e-5).cuda().bfloat16()
    norm.weight.data.copy_(normal(4096))
    x = normal(16, 1, 4096, seed=1)
    with torch.no_grad():
        same = (norm(x) == rms_norm(x, norm.weight, 1e-5)).float().mean()
    assert same > 0.999  # a sum in another order may tip a rounding


def test_a_compiled_model_computes_what_it_did():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).cuda().bfloat16().eval()
    compiled = compile_parts(ready_to_compile(model, regions=False))
    ids = torch.randint(0, 64, (2, 8), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.no_grad():
        right = model(ids).logits.float()
        with told_that_it_is_compiled():
            logits = compiled(ids).logits.float()
    assert (logits - right).norm() / right.norm() < 0.02
