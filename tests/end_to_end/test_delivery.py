"""The end of a search: the recommended plan is saved, loaded again and run as its user will run it."""

from __future__ import annotations

import json

import pytest
import torch

from autoquant.delivery import checkpoint, on_disk
from autoquant.errors import DiskFullError
from autoquant.events import Notice
from autoquant.models import from_module, load_model
from autoquant.records import Workload
from autoquant.runtime.user_loop import Usage
from autoquant.tuner.deliver import Deliverer
from autoquant.tuner.workers import delivery_process

from .tiny import Perceptron

USAGE = Usage(kind="causal_lm", workload=Workload.parse("prefill=8,decode=4"), device="cpu")


@pytest.fixture
def plan(study):
    return next(
        p for p in study.plans() if p.kind == "uniform" and p.label.endswith("int8-row a16")
    )


@pytest.fixture
def loaded(searched):
    return load_model(str(searched.model), dtype="auto", device="cpu")


def delivered(loaded, plan, usage=USAGE):
    """The delivery, and what was told."""
    told = []
    result = Deliverer(loaded=loaded, usage=usage, calibration=None, listener=told.append)(plan)
    return result, [event.text for event in told if isinstance(event, Notice)]


def test_a_search_keeps_how_its_recommended_plan_runs(searched, study):
    recommended = json.loads(searched.result.stdout)["recommended"]
    kept = study.deliveries()[recommended["plan_id"]]
    assert (kept.loop, kept.where, kept.logits_error, kept.reason) == (
        "generate",
        "same process",
        0.0,
        "",
    )
    assert recommended["as_run_request_ms"] == kept.times.request_ms
    assert recommended["as_run_speedup"] == pytest.approx(1 / kept.ratio.value)
    assert "deliver: 1 plan run as you will run it" in searched.result.stderr
    assert (
        "not loaded again in a new process: AUTOQUANT_IN_PROCESS is set" in searched.result.stderr
    )


@pytest.mark.processes
def test_a_saved_plan_gives_the_same_in_a_new_process(loaded, plan, monkeypatch):
    monkeypatch.delenv("AUTOQUANT_IN_PROCESS")
    found, told = delivered(loaded, plan)
    assert (found.where, found.logits_error, found.reason) == (
        "new process",
        0.0,
        "",
    ) and told == []
    assert (
        found.times.request_ms > found.times.first_token_ms > 0
        and found.original_times.request_ms > 0
    )
    assert found.ratio.value == pytest.approx(
        found.times.request_ms / found.original_times.request_ms
    )


def test_a_plan_that_ends_the_process_is_refused(loaded, plan, monkeypatch):
    monkeypatch.delenv("AUTOQUANT_IN_PROCESS")
    monkeypatch.setattr(delivery_process, "WORKER", "this")  # prints, and ends
    found, _ = delivered(loaded, plan)
    assert found.where == "new process" and found.times is None
    assert "the process that loaded it was ended (exit code 0)" in found.reason


@pytest.mark.processes
def test_a_model_that_is_changed_meanwhile_is_an_error_of_that_process(loaded, plan, monkeypatch):
    monkeypatch.delenv("AUTOQUANT_IN_PROCESS")
    loaded.content_hash = "0ther"
    found, _ = delivered(loaded, plan)
    assert "ModelError" in found.reason and "was changed while it was searched" in found.reason


def test_a_plan_that_cannot_be_saved_or_loaded_is_refused_with_the_reason(
    loaded, plan, monkeypatch
):
    def broken(*_arguments, **_options):
        raise RuntimeError("cannot be moved\nin many words")

    with monkeypatch.context() as patch:
        patch.setattr(on_disk, "load", broken)
        assert delivered(loaded, plan)[0].reason == "RuntimeError: cannot be moved"
    monkeypatch.setattr(checkpoint, "write", broken)
    assert delivered(loaded, plan)[0].reason == "RuntimeError: cannot be moved"


def test_a_full_disk_is_no_reason_to_refuse_a_plan(loaded, plan, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device", "/tmp/model.safetensors")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(DiskFullError, match="no room for /tmp/model"):
        delivered(loaded, plan)


def test_a_plan_that_computes_something_else_when_loaded_is_refused(loaded, plan, monkeypatch):
    load = on_disk.load

    def other_weights(*arguments, **options):
        module = load(*arguments, **options)
        with torch.no_grad():
            module.model.norm.weight.neg_()
        return module

    monkeypatch.setattr(on_disk, "load", other_weights)
    found, _ = delivered(loaded, plan)
    assert (
        "loaded again it computes something else: its output is off by 2 (relative)" in found.reason
    )
    assert found.times is None


def test_a_generate_that_gives_other_tokens_is_refused(loaded, plan, monkeypatch):
    load = on_disk.load

    def other_tokens(*arguments, **options):
        module = load(*arguments, **options)
        whole = module.generate
        module.generate = lambda ids, **kwargs: (whole(ids, **kwargs) + 1) % 128
        return module

    monkeypatch.setattr(on_disk, "load", other_tokens)
    assert "generate gives another token at position" in delivered(loaded, plan)[0].reason


def test_a_live_module_is_run_in_memory_with_a_notice(plan, searched):
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(searched.model)
    live = from_module(module)
    before = {name: id(parameter) for name, parameter in live.module.named_parameters()}
    found, told = delivered(live, plan)
    assert (found.where, found.reason, found.logits_error) == (
        "in memory",
        "",
        None,
    ) and found.times is not None
    assert len(told) == 1 and "AUTOQUANT_IN_PROCESS" in told[0]
    assert before == {name: id(parameter) for name, parameter in live.module.named_parameters()}, (
        "left as it is"
    )


def test_inputs_that_no_other_process_can_have_keep_it_here(loaded, plan, monkeypatch):
    monkeypatch.delenv("AUTOQUANT_IN_PROCESS")
    usage = Usage(
        kind="causal_lm", workload=USAGE.workload, device="cpu", sample_inputs=(lambda: None,)
    )
    found, told = delivered(loaded, plan, usage)
    assert found.where == "same process" and "its sample inputs cannot be sent there" in told[0]


def test_a_module_that_is_no_language_model_is_delivered_by_a_forward_pass(tmp_path):
    import autoquant

    def quality(module, part):
        torch.manual_seed(len(part))
        return [float(module(torch.randn(4, 32)).square().mean()) for _ in range(4)]

    study = autoquant.search(
        Perceptron().eval(),
        quality=quality,
        sample_inputs=(torch.randn(4, 32),),
        db=tmp_path / "plan.db",
        device="cpu",
        candidates=["int8-row/plain/int8pack-mm"],
        max_ppl_increase=10.0,
        minimize="memory",
        time_budget_s=0.1,
    )
    (kept,) = study.deliveries().values()
    assert (kept.loop, kept.where, kept.reason) == ("forward", "in memory", "")
    assert kept.times.first_token_ms is None and study.recommended().plan_id == kept.plan_id
