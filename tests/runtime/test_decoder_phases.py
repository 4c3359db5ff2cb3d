"""The phases of a compiled language model: the steps of `generate`."""

import pytest
import torch
from models.tiny_models import as_loaded, tiny_llama

from autoquant.records import Workload
from autoquant.runtime import parts
from autoquant.runtime.decoder_phases import DecoderPhases
from autoquant.runtime.phases import make_phases


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Graphs are run as they were traced."""
    monkeypatch.setattr(parts, "FUNCTIONS", {})
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, _inputs: graph)


def phases_of(module, workload="prefill=7,decode=4", batch=1):
    return make_phases(as_loaded(module), Workload.parse(workload, batch), compiled=True)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", ["run", "run_eager", "run_launched"])
def test_a_decode_step_gives_the_logits_of_a_full_forward_pass(batch, way):
    module = tiny_llama(dtype=torch.float32)
    phases = phases_of(module, batch=batch)
    assert isinstance(phases, DecoderPhases)
    run = getattr(phases, way)
    with torch.no_grad():
        full = module(phases._tokens.ids, use_cache=False).logits
    for _ in range(2):
        phases.reset("decode")
        assert phases.limit("decode") == 4
        for position in range(7, 11):
            logits = run("decode")
            assert logits.shape[1] == 1
            close(logits[:, -1], full[:, position])
        phases.reset("prefill")
        close(run("prefill")[:, -1], full[:, 6])
    assert phases.limit("prefill") == 1


def test_steps_are_repeated_behind_the_same_prompt_without_running_it_again():
    module = tiny_llama(dtype=torch.float32)
    phases = phases_of(module)
    with torch.no_grad():
        full = module(phases._tokens.ids, use_cache=False).logits
    phases.reset("prefill")
    phases.run("prefill")
    phases.reset("decode")
    phases.run("decode")  # compiles
    read = []
    module.model.embed_tokens.register_forward_hook(
        lambda _module, inputs, _output: read.append(inputs[0].shape[1])
    )
    for _ in range(3):
        phases.reset("decode")
        for position in range(7, 11):
            close(phases.run_eager("decode")[:, -1], full[:, position])
    assert read == 12 * [1]


def test_steps_follow_the_prompt_also_after_another_one_was_read():
    module = tiny_llama(dtype=torch.float32)
    phases = phases_of(module)
    other = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    with torch.no_grad():
        expected = module(other, use_cache=False).logits
    close(phases.compiled_prompt()(other), expected)
    phases.reset("decode")
    assert phases.run("decode").isfinite().all()


def test_decoding_alone_starts_from_one_token():
    module = tiny_llama(dtype=torch.float32)
    phases = phases_of(module, "decode=3")
    with torch.no_grad():
        full = module(phases._tokens.ids[:, :3], use_cache=False).logits
    phases.reset("decode")
    close(phases.run("decode")[:, -1], full[:, 1])
    close(phases.run("decode")[:, -1], full[:, 2])


def test_a_model_that_keeps_something_else_is_compiled_by_regions(monkeypatch):
    def keeps_states(*_arguments, **_options):
        raise TypeError("it keeps a state")

    monkeypatch.setattr("autoquant.runtime.decoder_phases.Decoder", keeps_states)
    phases = phases_of(tiny_llama())
    assert not isinstance(phases, DecoderPhases) and phases.compiled_prompt() is None


def test_a_model_that_keeps_a_state_runs_its_phases(monkeypatch):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=64, bos_token_id=0, eos_token_id=0
    )
    module = MambaForCausalLM(config).eval().requires_grad_(False)
    monkeypatch.setattr("autoquant.runtime.phases.compile_forward", lambda function: function)
    phases = phases_of(module)
    assert not isinstance(phases, DecoderPhases)
    for phase in ("prefill", "decode"):
        phases.reset(phase)
        expected = phases.run_eager(phase)
        phases.reset(phase)
        close(phases.run(phase), expected)
