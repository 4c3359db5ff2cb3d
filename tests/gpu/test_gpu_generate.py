"""The replayed `generate` on a GPU: the text of transformers' own loop, quantized and not."""

import copy
import warnings

import pytest
import torch
from delivery.every_format import VOCABULARY, Case, make_llama, make_plan
from torch import nn

import autoquant
from autoquant.runtime.generate.generation import decoders_of
from autoquant.runtime.prepare import prepare
from autoquant.runtime.request import MAX_RELATIVE_ERROR

pytestmark = pytest.mark.gpu

# What a search takes for a near tie: the logits of random weights lie close together.
NEAR = MAX_RELATIVE_ERROR
CASES = {
    "bf16": None,
    "4 bits, joined": Case("int4-g128/tiled joined", ("int4-g128/tiled",), joined=True),
    "float8 and 4 bits": Case("mixed", ("float8-row/plain", "int4-g64/tiled")),
}


@pytest.fixture(params=CASES)
def model(request):
    module = make_llama().cuda().requires_grad_(False)
    module.config.max_position_embeddings = 512
    case = CASES[request.param]
    return (
        prepare(module)
        if case is None
        else autoquant.apply(make_plan(module, case, "cuda"), module)
    )


def prompts(batch, tokens):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator).cuda()


def assert_same_text(model: nn.Module, ids, **settings):
    """Check both loops' tokens; the first that differ may be a near tie."""
    settings = {
        "max_new_tokens": 24,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        **settings,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = model.generate(ids, **settings)
    assert not [warning for warning in caught if "autoquant" in str(warning.message)]
    plain = model.generate(ids, disable_compile=True, **settings)
    shared = min(fast.shape[1], plain.shape[1])  # one loop may end before the other at a near tie
    assert fast.shape == plain.shape or (fast[:, :shared] != plain[:, :shared]).any()
    for ours, theirs in zip(fast, plain, strict=True):
        differ = (ours[:shared] != theirs[:shared]).nonzero()
        if len(differ):
            place = int(differ[0])
            logits = model(theirs[None, :place]).logits[0, -1].float()
            gap = (logits[ours[place]] - logits[theirs[place]]).abs() / (
                logits.max() - logits.mean()
            )
            assert gap < NEAR


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 64), (1, 100), (3, 300)])
def test_greedy_text_is_the_same(model, batch, tokens):
    assert_same_text(model, prompts(batch, tokens))


def test_tokens_chosen_within_the_step_are_those_that_are_chosen_between_steps(model):
    ids = prompts(2, 40)
    text = model.generate(ids, max_new_tokens=20, do_sample=False, disable_compile=True)[:, 40:]
    ends = {"eos_token_id": [int(text[0, 4]), int(text[1, 7])]}
    assert_same_text(model, ids, **ends)
    assert_same_text(model, ids, **ends, min_new_tokens=12)


@pytest.mark.parametrize("settings", [{"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {}])
def test_a_seed_draws_the_same_tokens_in_every_call(model, settings):
    ids, drawn = prompts(2, 40), []
    for seed in (7, 7, 8, 7):
        torch.manual_seed(seed)
        drawn.append(model.generate(ids, max_new_tokens=20, do_sample=True, **settings))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[1], drawn[2])


def test_padding_is_hidden(model):
    ids = prompts(2, 90)
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        alone = model.generate(ids[:1, 40:], max_new_tokens=6, do_sample=False)
    assert (together[0, 90:93] == alone[0, 50:53]).all()


def test_it_ends_and_streams_as_it_should(model):
    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got += value.reshape(-1).tolist()

        def end(self):
            self.got.append("end")

    ids = prompts(1, 20)
    text = model.generate(ids, max_new_tokens=20, do_sample=False)[0]
    streamer, end = Streamer(), int(text[26])
    short = model.generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=end, streamer=streamer
    )[0]
    first = text[20:].tolist().index(end) + 21
    assert short.tolist() == text[:first].tolist()
    assert streamer.got == [*short.tolist(), "end"]


def test_a_decoder_is_kept_for_the_next_call_and_goes_with_the_model(model):
    ids = prompts(1, 30)
    model.generate(ids, max_new_tokens=4, do_sample=False)
    before = list(decoders_of(model)._kept.values())
    model.generate(prompts(1, 50), max_new_tokens=4, do_sample=False)
    assert list(decoders_of(model)._kept.values()) == before
    assert not decoders_of(copy.deepcopy(model))._kept
