"""Other numbers for one weight, and a model held in float32."""

import pytest
import torch
import torch.nn.functional as F
from models.tiny_models import tiny_llama
from torch import nn

from autoquant.evaluators.emulate import EmulatedLinear, in_float32


def unchanged(x):
    return x


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: F.linear(x, w, b),
        lambda x, w, b: F.linear(x, w, bias=b),
        lambda x, w, b: F.linear(x, weight=w, bias=b),
        lambda x, w, b: F.linear(input=x, weight=w, bias=b),
        lambda x, w, b: torch.ops.aten.linear.default(x, w, b),
    ],
)
def test_a_linear_on_the_parameter_uses_the_other_weight_and_the_rounded_activation(call):
    x, bias = torch.randn(3, 8), torch.randn(4)
    parameter, weight = nn.Parameter(torch.randn(4, 8)), torch.randn(4, 8)
    with EmulatedLinear(parameter, weight, lambda x: x.round()):
        y = call(x, parameter, bias)
    torch.testing.assert_close(y, x.round() @ weight.t() + bias)


def test_another_parameter_with_the_same_numbers_is_left_alone():
    x, parameter = torch.randn(3, 8), nn.Parameter(torch.randn(4, 8))
    twin = nn.Parameter(parameter.detach().clone())
    with EmulatedLinear(parameter, torch.zeros(4, 8), unchanged):
        assert torch.equal(F.linear(x, twin), F.linear(x, twin))
        assert F.linear(x, twin).abs().sum() > 0 and F.linear(x, parameter).abs().sum() == 0
    assert F.linear(x, parameter).abs().sum() > 0


def test_an_embedding_tied_to_the_weight_is_left_alone():
    parameter = nn.Parameter(torch.randn(16, 8))
    with EmulatedLinear(parameter, torch.zeros(16, 8), unchanged):
        assert F.embedding(torch.tensor([3]), parameter).abs().sum() > 0


def every_16_bit_number(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


class Mixed(nn.Module):
    """Parameters of several dtypes with every number there is, two of them tied."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 256, dtype=torch.bfloat16)
        self.head = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
        numbers = every_16_bit_number(torch.bfloat16)
        self.head.weight = nn.Parameter(
            numbers[~numbers.isnan()].reshape(-1, 2), requires_grad=False
        )
        self.embedding.weight = self.head.weight
        halves = every_16_bit_number(torch.float16)
        self.sixteen = nn.Parameter(halves[~halves.isnan()], requires_grad=False)
        self.sixty_four = nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.thirty_two = nn.Parameter(torch.randn(7))
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("table", torch.randn(3, dtype=torch.bfloat16))


def snapshot(module):
    return {
        name: (id(p), p.dtype, p.requires_grad, p.detach().contiguous().view(torch.uint8).clone())
        for name, p in module.named_parameters(remove_duplicate=False)
    }


def assert_restored(module, before):
    after = snapshot(module)
    assert before.keys() == after.keys()
    for name, (identity, dtype, requires_grad, bits) in before.items():
        assert after[name][:3] == (identity, dtype, requires_grad), name
        assert torch.equal(after[name][3], bits), name
    assert module.embedding.weight is module.head.weight


def test_parameters_are_float32_inside_and_the_same_bits_afterwards():
    module = Mixed()
    before = snapshot(module)
    numbers = module.head.weight.detach().clone()
    with in_float32(module):
        assert {name: p.dtype for name, p in module.named_parameters()} == {
            "embedding.weight": torch.float32,
            "sixteen": torch.float32,
            "sixty_four": torch.float64,
            "thirty_two": torch.float32,
            "counts": torch.int64,
        }
        assert (
            module.embedding.weight is module.head.weight
            and id(module.sixteen) == before["sixteen"][0]
        )
        assert (
            torch.equal(module.head.weight, numbers.float())
            and module.table.dtype == torch.bfloat16
        )
    assert_restored(module, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_parameters_are_put_back_after_an_error(error):
    module = Mixed()
    before = snapshot(module)
    with pytest.raises(error), in_float32(module):
        raise error
    assert_restored(module, before)


def test_a_tied_language_model_runs_in_float32_and_comes_back():
    module = tiny_llama(tied=True)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = module(ids).logits
        with in_float32(module):
            wide = module(ids).logits
        after = module(ids).logits
    assert (before.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(before, after) and not torch.equal(before.float(), wide)
    assert module.lm_head.weight is module.model.embed_tokens.weight
