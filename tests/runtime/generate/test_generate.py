"""The `generate` of prepared models, beside that of transformers."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
import transformers
from models.tiny_models import tiny_llama
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from autoquant.candidates import get_format
from autoquant.candidates.routed import RoutedWeight
from autoquant.devices import Backend, backend
from autoquant.devices.cpu import CpuBackend
from autoquant.records import RouteStep
from autoquant.runtime.generate import decoder, generation
from autoquant.runtime.generate.generation import decoders_of
from autoquant.runtime.prepare import prepare

VOCABULARY = 60


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """Steps run as they are; how they are compiled has tests of its own."""
    monkeypatch.setattr(CpuBackend, "compile_failure", lambda _backend: "not in these tests")


@pytest.fixture
def plain():
    model = tiny_llama().float().eval().requires_grad_(False)
    model.generation_config.pad_token_id = 0
    model.config.max_position_embeddings = 512
    return model


@pytest.fixture
def model(plain):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield prepare(copy.deepcopy(plain))


@pytest.fixture
def chosen_within(monkeypatch):
    """Return the rules of all tokens that are chosen within a step."""
    rules, choose = [], decoder.Decoder.choose

    def watched(self, rule):
        rules.append(rule)
        return choose(self, rule)

    monkeypatch.setattr(decoder.Decoder, "choose", watched)
    return rules


def prompts(batch=1, tokens=20, seed=0):
    return torch.randint(
        1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed)
    )


def both(model, plain, ids, **settings):
    found = []
    for each in (model, plain):
        torch.manual_seed(0)
        found.append(each.generate(ids, **settings))
    return found


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 200, 330])
def test_greedy_text_is_the_same_for_prompts_of_any_length(model, plain, tokens):
    fast, slow = both(model, plain, prompts(tokens=tokens), max_new_tokens=12, do_sample=False)
    assert torch.equal(fast, slow)


def test_the_next_call_does_not_see_the_last_one(model, plain):
    for seed, tokens in enumerate((120, 9, 70)):
        ids = prompts(2, tokens, seed)
        fast, slow = both(model, plain, ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(fast, slow)


def test_padded_sequences_get_the_same_text(model, plain):
    ids, mask = prompts(3, 90), torch.ones(3, 90, dtype=torch.long)
    mask[0, :40], mask[2, :1] = 0, 0
    fast, slow = both(model, plain, ids, attention_mask=mask, max_new_tokens=15, do_sample=False)
    assert torch.equal(fast, slow)


def test_sampling_with_processors_draws_the_same_tokens(model, plain):
    settings = {
        "do_sample": True,
        "top_k": 10,
        "temperature": 0.7,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
    }
    fast, slow = both(model, plain, prompts(2), max_new_tokens=20, **settings)
    assert torch.equal(fast, slow)


SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01}


@pytest.mark.parametrize(
    "settings",
    [SAMPLED, {"do_sample": False}, {"do_sample": True, "temperature": 1.3}, {"do_sample": True}],
    ids=["all warpers", "greedy", "temperature", "sampled"],
)
@pytest.mark.parametrize("least", [{}, {"min_new_tokens": 9}, {"min_length": 27}])
def test_tokens_are_chosen_within_the_step_as_transformers_does_it(
    model, plain, settings, least, chosen_within
):
    text = plain.generate(prompts(2), max_new_tokens=30, do_sample=False)[:, 20:]
    settings = {**settings, **least, "eos_token_id": [int(text[0, 3]), int(text[1, 5]), 41]}
    for _ in range(2):  # again by the same steps
        fast, slow = both(model, plain, prompts(2), max_new_tokens=25, **settings)
        assert torch.equal(fast, slow)
    assert len(set(chosen_within)) == 1


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"output_logits": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_rules_that_look_at_more_than_the_scores_are_left_to_the_loop(
    model, plain, settings, chosen_within
):
    settings = {**settings, "return_dict_in_generate": True, "do_sample": False}
    fast, slow = both(model, plain, prompts(2), max_new_tokens=8, **settings)
    assert torch.equal(fast.sequences, slow.sequences) and not chosen_within


def test_steps_of_few_rules_are_kept(model):
    for temperature in range(1, 12):
        model.generate(prompts(), max_new_tokens=3, do_sample=True, temperature=float(temperature))
    (kept,) = decoders_of(model)._kept.values()
    assert len(kept._choosing) == decoder._MOST_RULES


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", [int, lambda end: [end, 63], lambda end: [[end]]])
def test_it_ends_where_every_sequence_has_ended(model, plain, batch, form):
    ids = prompts(batch)
    text = plain.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
    end = form(int(text[7]))
    fast, slow = both(model, plain, ids, max_new_tokens=30, do_sample=False, eos_token_id=end)
    assert torch.equal(fast, slow)


def test_scores_logits_and_cache_are_handed_out_as_asked(model, plain):
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    fast, slow = both(model, plain, prompts(2), max_new_tokens=6, do_sample=False, **settings)
    assert torch.equal(fast.sequences, slow.sequences)
    for name in ("scores", "logits"):
        for one, other in zip(getattr(fast, name), getattr(slow, name), strict=True):
            torch.testing.assert_close(one, other)
    assert fast.past_key_values.get_seq_length() == slow.past_key_values.get_seq_length()
    for one, other in zip(fast.past_key_values.layers, slow.past_key_values.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)


class Streamer:
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


def test_a_streamer_gets_the_tokens_one_by_one(model, plain):
    fast, slow = Streamer(), Streamer()
    for each, streamer in ((model, fast), (plain, slow)):
        each.generate(prompts(), max_new_tokens=5, do_sample=False, streamer=streamer)
    assert fast.got == slow.got and len(fast.got) == 7


def test_criteria_and_processors_of_the_users_own_see_every_step(model, plain):
    class AfterFour(StoppingCriteria):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **_):
            self.seen.append(input_ids.shape[1])
            return torch.full((len(input_ids),), len(self.seen) == 4)

    def never_seven(_ids, scores):
        scores[:, 7] = -torch.inf
        return scores

    results = []
    for each in (model, plain):
        criterion = AfterFour()
        text = each.generate(
            prompts(),
            max_new_tokens=20,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([criterion]),
            logits_processor=LogitsProcessorList([never_seven]),
        )
        results.append((text.tolist(), criterion.seen))
    assert results[0] == results[1] and results[0][1] == [21, 22, 23, 24]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"use_cache": False}, "without a cache"),
        ({"disable_compile": True}, "disable_compile"),
        ({"inputs_embeds": torch.zeros(1, 20, 32)}, "inputs_embeds"),
    ],
)
def test_what_cannot_be_replayed_runs_as_in_transformers_with_one_warning(
    model, plain, settings, reason
):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            fast = model.generate(prompts(), max_new_tokens=4, do_sample=False, **settings)
    slow = plain.generate(prompts(), max_new_tokens=4, do_sample=False, **settings)
    text = [str(warning.message) for warning in caught if "autoquant" in str(warning.message)]
    assert len(text) == 1 and reason in text[0]
    fast, slow = (
        found if isinstance(found, torch.Tensor) else found.sequences for found in (fast, slow)
    )
    assert torch.equal(fast, slow)


def test_a_conversation_goes_on_from_the_cache_that_was_handed_out(model, plain):
    first = both(
        model, plain, prompts(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    texts = []
    for each, output in zip((model, plain), first, strict=True):
        ids = torch.cat((output.sequences, prompts(tokens=6, seed=3)), dim=1)
        texts.append(
            each.generate(
                ids, past_key_values=output.past_key_values, max_new_tokens=6, do_sample=False
            )
        )
    assert torch.equal(*texts)


ARCHITECTURES = {
    "Qwen3Config": {"head_dim": 8},
    "MistralConfig": {"sliding_window": 16},  # prompts are longer
    "Gemma3TextConfig": {"head_dim": 8, "sliding_window": 16},
    "GPTNeoXConfig": {},
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen3NextConfig": {"head_dim": 8, "num_hidden_layers": 4},  # three layers keep other states
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_give_the_same_text(name):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if name == "GPTNeoXConfig" else 2}
    config = getattr(transformers, name)(
        **sizes,
        **heads,
        pad_token_id=0,
        eos_token_id=2,
        **{"num_hidden_layers": 2, **ARCHITECTURES[name]},
    )
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :20] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepare(copy.deepcopy(plain))
        for batch, given in ((1, None), (2, mask)):
            ids = prompts(batch, 70)
            fast, slow = both(
                model, plain, ids, attention_mask=given, max_new_tokens=8, do_sample=False
            )
            assert torch.equal(fast, slow)


def test_hooks_of_the_users_own_are_called(model):
    called = []
    ids = prompts()
    model.generate(ids, max_new_tokens=3, do_sample=False)
    handle = model.model.layers[0].register_forward_hook(lambda *_: called.append(1))
    with pytest.warns(UserWarning, match="hooks"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    handle.remove()
    assert len(called) == 3


def test_a_quantized_model_gives_the_text_of_its_plain_loop_also_after_a_weight_is_replaced(model):
    fmt = get_format("int8-row/plain")
    route = (RouteStep(upper_m=None, kernel="dequantize-matmul"),)
    linear = model.model.layers[0].mlp.down_proj
    for factor in (1, -40):
        stored = fmt.store(torch.randn(linear.out_features, linear.in_features) * factor)
        linear.weight = torch.nn.Parameter(
            RoutedWeight.wrap(stored, fmt.id, route, torch.float32), requires_grad=False
        )
        prepare(model)
        texts = [
            model.generate(prompts(), max_new_tokens=8, do_sample=False, disable_compile=p)
            for p in (False, True)
        ]
        assert torch.equal(*texts)


def test_a_copy_of_a_model_generates_by_itself(model, plain):
    ids = prompts()
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    other = copy.deepcopy(model)
    assert torch.equal(other.generate(ids, max_new_tokens=5, do_sample=False), before)
    assert decoders_of(other) is not decoders_of(model)


def test_calls_from_several_threads_do_not_mix(model, plain):
    found = {}

    def run(seed):
        found[seed] = model.generate(prompts(seed=seed), max_new_tokens=15, do_sample=False)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, text in found.items():
        assert torch.equal(
            text, plain.generate(prompts(seed=seed), max_new_tokens=15, do_sample=False)
        )


def test_the_model_stays_of_its_class_and_name(model, plain, tmp_path):
    assert isinstance(model, type(plain)) and type(model).__name__ == type(plain).__name__
    assert prepare(model) is model
    model.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in plain.state_dict().items()
    )


@pytest.mark.parametrize("tokens", [1, 64, 65, 300, 1024, 1300, 5000])
@pytest.mark.parametrize("batch", [1, 16, 400])
def test_chunks_cover_a_prompt_and_waste_less_than_one_of_the_smallest(tokens, batch):
    chunks = decoder.chunks_of(tokens, batch)
    assert sum(chunks) >= tokens > sum(chunks[:-1])
    assert set(chunks) <= set(decoder.CHUNKS)
    assert sum(chunks) - tokens < max(64, tokens / 2)


def test_the_chunks_of_a_prompt_fit_into_the_cache_that_is_made_for_it():
    for tokens in range(1, 9000):
        for batch in (1, 40, 400):
            assert sum(decoder.chunks_of(tokens, batch)) <= decoder.cache_positions(tokens + 1)


def test_few_lengths_of_caches_are_compiled_for():
    lengths = {decoder.cache_positions(tokens) for tokens in range(1, 4097)}
    assert lengths == {256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096}


@pytest.mark.slow
def test_compiled_steps_give_the_same_text(plain, monkeypatch):
    monkeypatch.setattr(CpuBackend, "compile_failure", Backend.compile_failure)
    monkeypatch.delenv("AUTOQUANT_EAGER", raising=False)
    assert (
        backend("cpu").compile_failure() is None
    )  # imported here: the compiler's own warnings are not meant below
    model = prepare(copy.deepcopy(plain))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = model.generate(prompts(), max_new_tokens=12, do_sample=False)
    assert not [warning for warning in caught if "autoquant" in str(warning.message)]
    assert torch.equal(fast, plain.generate(prompts(), max_new_tokens=12, do_sample=False))


def test_autocast_runs_the_plain_way_before_and_after_a_replayed_call(model, plain):
    both(model, plain, prompts(), max_new_tokens=3, do_sample=False)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
        fast, slow = both(model, plain, prompts(), max_new_tokens=5, do_sample=False)
    assert torch.equal(fast, slow)


def test_a_pickled_model_generates_the_same(model, plain):
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    fast, slow = both(again, plain, prompts(), max_new_tokens=5, do_sample=False)
    assert torch.equal(fast, slow)


def test_a_replaced_weight_gets_new_steps_and_the_old_ones_are_dropped(model):
    model.generate(prompts(), max_new_tokens=2, do_sample=False)
    (old,) = decoders_of(model)._kept.values()
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(-linear.weight, requires_grad=False)
    model.generate(prompts(), max_new_tokens=2, do_sample=False)
    (new,) = decoders_of(model)._kept.values()
    assert new is not old


def test_a_device_that_is_not_known_is_a_reason_to_run_the_plain_way(model):
    reason = generation._place_reason(model.to("meta"), prompts())
    assert reason == "steps are not compiled for meta"


@pytest.mark.parametrize("wrong", [-1, 64])
def test_token_ids_without_embeddings_are_refused_before_compiled_code_reads_them(model, wrong):
    ids = prompts(tokens=5)
    ids[0, 3] = wrong
    with pytest.raises(IndexError, match=f"token id {wrong} .* for 64 ids"):
        model.generate(ids, max_new_tokens=2)
