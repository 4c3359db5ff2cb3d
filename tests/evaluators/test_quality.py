"""Losses and divergences against plain formulas."""

import numpy as np
import pytest
import torch
from models.tiny_models import Perceptron, tiny_llama
from torch import nn

from autoquant.evaluators.logits import compare_window, divergence_sum, window_loss
from autoquant.evaluators.quality import FunctionQuality, TextQuality, next_token_logits
from autoquant.evaluators.text import PARTS, TextParts


def random(*size, seed=0, dtype=torch.float32, scale=3.0):
    return (torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def plain_loss(logits, ids):
    log_p = torch.log_softmax(logits.double(), -1)
    tokens = ids[0].tolist()
    return -sum(log_p[i, token].item() for i, token in enumerate(tokens[1:])) / (len(tokens) - 1)


class Tokens(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 64)

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 20, 128, 129, 300])
def test_the_loss_of_a_window_is_the_mean_of_its_next_tokens(tokens, dtype):
    logits = random(tokens, 64, dtype=dtype)
    ids = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(1))
    assert window_loss(logits, ids) == pytest.approx(plain_loss(logits, ids), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 20, 128, 129, 300])
def test_the_divergence_is_kl_of_the_reference_from_the_model(rows, dtype, mean_divergence):
    reference, logits = random(rows, 64, dtype=dtype), random(rows, 64, seed=1, dtype=dtype)
    assert divergence_sum(reference, logits) == pytest.approx(
        mean_divergence(reference, logits) * rows, rel=1e-5
    )
    assert divergence_sum(reference, logits) != pytest.approx(
        divergence_sum(logits, reference), rel=1e-3
    )


def test_a_model_does_not_diverge_from_itself():
    logits = random(200, 64, scale=20.0)
    assert divergence_sum(logits, logits) == 0.0
    assert divergence_sum(logits, logits + 3) == pytest.approx(0.0, abs=1e-4)


def test_a_window_is_compared_as_each_measure_alone_does():
    ids = torch.randint(0, 50, (1, 300), generator=torch.Generator().manual_seed(0))
    reference = random(300, 50, dtype=torch.bfloat16)
    logits = reference + random(300, 50, seed=1, dtype=torch.bfloat16, scale=0.1)
    found = compare_window(reference, logits, ids)
    assert found.loss == pytest.approx(window_loss(logits, ids), rel=1e-6)
    assert found.reference_loss == pytest.approx(window_loss(reference, ids), rel=1e-6)
    assert found.divergence == pytest.approx(divergence_sum(reference, logits), rel=1e-5)


@pytest.mark.slow
def test_a_compiled_comparison_gives_the_same():
    ids = torch.randint(0, 500, (1, 300), generator=torch.Generator().manual_seed(0))
    reference = random(300, 500, dtype=torch.bfloat16)
    logits = reference + random(300, 500, seed=1, dtype=torch.bfloat16, scale=0.1)
    eager, compiled = (
        compare_window(reference, logits, ids, compiled=compiled) for compiled in (False, True)
    )
    assert compiled.loss == pytest.approx(eager.loss, rel=1e-6)
    assert compiled.reference_loss == pytest.approx(eager.reference_loss, rel=1e-6)
    assert compiled.divergence == pytest.approx(eager.divergence, rel=1e-4)


def test_the_logits_of_a_window_are_those_of_the_model():
    ids = torch.tensor([[1, 5, 9, 3]])
    module = tiny_llama(dtype=torch.float32)
    logits = next_token_logits(module, ids)
    assert logits.shape == (4, 64) and not logits.requires_grad
    with torch.no_grad():
        assert torch.equal(logits, module(ids).logits[0])
    plain = Tokens()
    assert torch.equal(next_token_logits(plain, ids), plain(ids)[0].detach())


@pytest.mark.parametrize("part", ["calibration", "selection", "report"])
def test_text_losses_are_those_of_each_window_of_the_part(quality, part):
    module = tiny_llama()
    windows = quality.parts.windows[part]
    losses = quality.losses(module, part)
    assert len(losses) == len(windows)
    for loss, window in zip(losses, windows, strict=True):
        ids = window.unsqueeze(0)
        assert loss == pytest.approx(plain_loss(next_token_logits(module, ids), ids), rel=1e-5)
    assert quality.logarithmic and quality.key == quality.parts.key


def test_a_comparison_holds_both_losses_and_their_divergence(quality, mean_divergence):
    module, reference = Tokens(1), Tokens(0)
    compared = quality.compare(module, reference, "report")
    assert compared.losses == quality.losses(module, "report")
    assert compared.reference == quality.losses(reference, "report") != compared.losses
    ids = quality.parts.windows["report"].flatten()
    with torch.no_grad():
        assert compared.kl == pytest.approx(mean_divergence(reference(ids), module(ids)), rel=1e-5)


def test_a_comparison_ends_when_enough_is_known_and_says_what_is_missing():
    ids = torch.randint(0, 64, (20, 8), generator=torch.Generator().manual_seed(0))
    quality = TextQuality(TextParts(dict.fromkeys(PARTS, ids)), "cpu")
    module, reference, asked = Tokens(1), Tokens(0), []
    whole = quality.compare(module, reference, "selection")

    def enough(so_far):
        asked.append((len(so_far.losses), so_far.unseen))
        return len(so_far.losses) == 10

    for known in ((), whole.reference):
        found = quality.compare(module, reference, "selection", known, enough)
        assert found.losses == whole.losses[:10] and found.reference == whole.reference[:10]
        assert found.sample_kl == whole.sample_kl[:10] and found.unseen == 10
        assert found.kl == pytest.approx(sum(found.sample_kl) / 10)
    assert asked == [(6, 14), (10, 10)] * 2 and whole.unseen == 0


def test_a_model_compared_with_itself_has_lost_nothing(quality):
    module = tiny_llama()
    compared = quality.compare(module, module, "selection")
    assert compared.losses == compared.reference and compared.kl == 0.0


def test_a_model_compared_with_itself_runs_once_and_not_at_all_if_its_losses_are_known(quality):
    module, runs = tiny_llama(), []
    module.lm_head.register_forward_hook(lambda *_: runs.append(1))
    compared = quality.compare(module, module, "report")
    assert len(runs) == len(quality.parts.windows["report"])
    again = quality.compare(module, module, "report", compared.losses)
    assert again == compared and len(runs) == len(quality.parts.windows["report"])


def test_a_loss_of_the_users_own_is_asked_once_for_a_model_compared_with_itself():
    calls = []
    quality = FunctionQuality(lambda _module, part: [len(calls), calls.append(part) or 1.0], "own")
    module = Perceptron()
    compared = quality.compare(module, module, "report")
    assert compared.losses == compared.reference == (0.0, 1.0) and calls == ["report"]
    assert quality.compare(module, module, "report", (3.0,)).losses == (3.0,)
    assert calls == ["report"]


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2, 3.5],
        (1, 2.0, 3.5),
        torch.tensor([1.0, 2.0, 3.5], requires_grad=True),
        torch.tensor([[1.0], [2.0], [3.5]]),
        [torch.tensor(1.0), torch.tensor(2.0), torch.tensor([3.5])],
        np.array([1.0, 2.0, 3.5]),
    ],
    ids=["list", "tuple", "tensor", "column", "list of tensors", "array"],
)
def test_a_function_of_the_users_own_may_give_its_losses_in_several_ways(value):
    losses = FunctionQuality(lambda module, part: value, "own").losses(Perceptron(), "report")
    assert losses == (1.0, 2.0, 3.5) and all(type(loss) is float for loss in losses)


@pytest.mark.parametrize("value", [2.5, torch.tensor(2.5), np.float32(2.5)])
def test_a_function_of_the_users_own_may_give_one_loss(value):
    assert FunctionQuality(lambda module, part: value, "own").losses(Perceptron(), "report") == (
        2.5,
    )


def test_a_function_of_the_users_own_compares_the_two_models_on_the_part():
    calls = []

    def function(module, part):
        calls.append((module, part, torch.is_grad_enabled()))
        return [module.up.weight.sum(), 1.0]

    module, reference = Perceptron(), Perceptron()
    quality = FunctionQuality(function, "own-1")
    compared = quality.compare(module, reference, "selection")
    assert [call[:2] for call in calls] == [(module, "selection"), (reference, "selection")]
    assert not any(call[2] for call in calls)
    assert compared.losses[0] == pytest.approx(module.up.weight.sum().item())
    assert compared.reference[0] == pytest.approx(reference.up.weight.sum().item())
    assert (compared.kl, quality.logarithmic, quality.key) == (None, False, "own-1")
