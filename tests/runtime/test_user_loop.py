"""What a user runs, timed."""

from dataclasses import replace

import pytest
import torch
from end_to_end.tiny import Perceptron, make_llama
from torch import nn

from autoquant.devices.effort import TimingEffort, timing_effort_of
from autoquant.errors import WorkloadError
from autoquant.records import Workload
from autoquant.runtime import request, user_loop
from autoquant.runtime.user_loop import (
    Answer,
    Usage,
    UserLoop,
    first_difference,
    time_user_loops,
    warm_up,
)

SHORT = TimingEffort(highest_other_load=9.0, request_rounds=3, request_calls=2, loop_rounds=3)
WORKLOAD = Workload.parse("prefill=6,decode=5", batch=2)
LM = Usage(kind="causal_lm", workload=WORKLOAD, device="cpu")


@pytest.fixture(scope="module")
def llama():
    return make_llama()


@pytest.fixture
def asked(llama, monkeypatch):
    """The calls of `generate`."""
    calls = []
    whole = llama.generate

    def note(ids, **options):
        made = whole(ids, **options)
        calls.append((tuple(ids.shape), tuple(made.shape), options["do_sample"]))
        return made

    monkeypatch.setattr(llama, "generate", note)
    return calls


@pytest.fixture(autouse=True)
def quick():
    with timing_effort_of(SHORT):
        yield


def test_a_language_model_is_asked_for_all_tokens_and_for_one(llama, asked):
    llama.generation_config.eos_token_id = list(range(1, 128))  # almost every token would end it
    loop = LM.loop_of(llama)
    for name in loop.names:
        loop.run(name)
    llama.generation_config.eos_token_id = 2
    assert asked == [((2, 6), (2, 11), False), ((2, 6), (2, 7), False)]


def test_the_time_of_a_further_token_is_what_the_request_takes_beyond_the_first(llama):
    loops = [LM.loop_of(llama), LM.loop_of(make_llama(layers=1))]
    warm_up(loops, "cpu")
    (original, smaller), note = time_user_loops(loops, "cpu")
    assert note == "" and original.ratio is None
    times = smaller.times
    assert times.step_ms == pytest.approx((times.request_ms - times.first_token_ms) / 4)
    assert times.request_ms < original.times.request_ms
    assert (
        smaller.ratio.low
        < smaller.ratio.value
        == pytest.approx(times.request_ms / original.times.request_ms)
    )


def test_a_prompt_alone_is_asked_for_one_token(llama, asked):
    loop = Usage(kind="causal_lm", workload=Workload.parse("prefill=6"), device="cpu").loop_of(
        llama
    )
    (found,), _ = time_user_loops([loop], "cpu")
    assert {shape for shape, _, _ in asked} == {(1, 6)} and {made for _, made, _ in asked} == {
        (1, 7)
    }
    assert found.times.first_token_ms == found.times.request_ms and found.times.step_ms is None


@pytest.mark.parametrize("inputs", [(torch.ones(3, 32),), {"x": torch.ones(3, 32)}])
def test_any_other_module_is_called_once(inputs):
    usage = Usage(kind="module", workload=Workload.single(), device="cpu", sample_inputs=inputs)
    (found,), _ = time_user_loops([usage.loop_of(Perceptron().eval())], "cpu")
    assert found.times.request_ms > 0 and found.times.first_token_ms is found.times.step_ms is None
    answer = usage.answer_of(Perceptron())
    assert answer.output.shape == (3, 8) and answer.ids is None


def test_a_module_without_inputs_is_refused():
    with pytest.raises(WorkloadError, match="sample inputs"):
        Usage(kind="module", workload=Workload.single(), device="cpu").loop_of(nn.Linear(2, 2))


def test_rounds_end_when_their_time_is_over(llama, monkeypatch):
    loop = LM.loop_of(llama)
    calls = []
    monkeypatch.setattr(request, "_sample", lambda _loop, name, *_rest: calls.append(name) or 1.0)
    time_user_loops([loop], "cpu", replace(SHORT, request_rounds=50, loop_limit_s=0.0))
    assert len(calls) == 3 * 2, "three rounds of two phases"


@pytest.mark.parametrize(
    ("noise", "rounds"),
    [
        (0.0, 4),  # at least these
        (0.02, 8),
        (0.5, 30),  # at most these
    ],
)
def test_rounds_go_on_until_the_ratio_is_known_to_two_percent(monkeypatch, noise, rounds):
    models = [UserLoop("forward", 0, {"request": lambda: None}) for _ in range(2)]
    done = {id(model): 0 for model in models}

    def sample(model, *_rest):
        done[id(model)] += 1
        return 5.0 + (5.0 * noise * (-1) ** done[id(model)] if model is models[1] else 0.0)

    monkeypatch.setattr(request, "_sample", sample)
    (_, plan), _ = time_user_loops(models, "cpu", replace(TimingEffort(), highest_other_load=9.0))
    assert set(done.values()) == {rounds}
    known = (plan.ratio.high - plan.ratio.low) / 2 < 0.02 * plan.ratio.value
    assert known == (rounds < 30)


def test_equal_models_give_equal_answers(llama):
    answer = LM.answer_of(llama)
    assert answer.error(LM.answer_of(make_llama())) == 0.0
    assert answer.ids.shape == (2, 11) and answer.output.shape == (1, 6, 128)
    assert answer.error(LM.answer_of(make_llama(seed=1))) > 0.1
    assert answer.error(Answer(torch.ones(2), None)) == float("inf")


def test_another_token_is_found_and_a_near_tie_is_none(llama, monkeypatch):
    answer = LM.answer_of(llama)
    with torch.no_grad():
        logits = llama(answer.ids[:, :7]).logits[0, -1].float()
    order = logits.sort(descending=True).indices
    worst = answer.ids.clone()
    worst[0, 7] = order[-1]
    assert first_difference(LM, llama, Answer(answer.output, worst), answer).startswith(
        "generate gives another token at position 7"
    )
    assert first_difference(LM, llama, answer, answer) == ""
    near = answer.ids.clone()
    near[0, 7] = order[1]
    monkeypatch.setattr(user_loop, "MAX_RELATIVE_ERROR", 1.0)
    assert first_difference(LM, llama, Answer(answer.output, near), answer) == ""


def test_another_token_in_a_later_text_is_found(llama):
    answer = LM.answer_of(llama)
    with torch.no_grad():
        logits = llama(answer.ids[:, :7]).logits[1, -1].float()
    worst = answer.ids.clone()
    worst[1, 7] = logits.argmin()
    assert first_difference(LM, llama, Answer(answer.output, worst), answer).startswith(
        "generate gives another token at position 7"
    )


def test_an_early_end_is_a_difference(llama):
    answer = LM.answer_of(llama)
    assert "ends at another token" in first_difference(
        LM, llama, Answer(answer.output, answer.ids[:, :-1]), answer
    )
