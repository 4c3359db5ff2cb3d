"""The same from Python: a live module, sample inputs and a quality function of the user's own."""

from __future__ import annotations

import copy
import logging
import random
import subprocess
import sys
import warnings

import numpy
import pytest
import torch

import autoquant
from autoquant.errors import ModelError, PlanError, TextError, WorkloadError
from autoquant.intervals import paired_increase
from autoquant.tuner import flow

from . import quick
from .tiny import Perceptron

CANDIDATES = (*quick.CANDIDATES, "bfloat16*")

SAMPLES = {
    part: torch.randn(size, 32, generator=torch.Generator().manual_seed(size))
    for part, size in (("calibration", 40), ("selection", 60), ("report", 80))
}
CALLS = []


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Perceptron().eval()


@pytest.fixture(scope="module")
def quality(teacher):
    """Squared distance to what the module gave before, per sample, and a little noise of the task."""
    wanted = {part: teacher(x).detach() + 0.5 for part, x in SAMPLES.items()}

    def squared_error(module, part):
        CALLS.append(part)
        return (module(SAMPLES[part]) - wanted[part]).square().mean(dim=1)

    return squared_error


@pytest.fixture
def search(teacher, quality, tmp_path):
    def run(module=None, **options):
        base = {
            "sample_inputs": (SAMPLES["calibration"][:4],),
            "quality": quality,
            "db": tmp_path / "plan.db",
        }
        base |= {"candidates": CANDIDATES, "time_budget_s": 0.5, "device": "cpu"}
        given = copy.deepcopy(teacher) if module is None else module
        return autoquant.search(given, **(base | options))

    return run


@pytest.fixture(scope="module")
def studied(teacher, quality, tmp_path_factory):
    """A finished study of the module, and the parts that its quality was asked for."""
    CALLS.clear()
    with quick.short():
        study = autoquant.search(
            copy.deepcopy(teacher),
            sample_inputs=(SAMPLES["calibration"][:4],),
            quality=quality,
            db=tmp_path_factory.mktemp("studied") / "plan.db",
            candidates=CANDIDATES,
            time_budget_s=0.5,
            device="cpu",
        )
    return study, list(CALLS)


def test_a_live_module_is_searched_by_the_users_own_quality(studied):
    study, parts = studied
    kinds = {plan.kind for plan in study.plans()}
    assert {"original", "uniform"} <= kinds
    assert set(parts) == {"calibration", "selection", "report"}
    assert all(proof.perplexity is None and proof.kl is None for proof in study.proofs().values())


def test_the_unquantized_module_is_judged_once_on_what_plans_are_judged_on(studied):
    study, parts = studied
    assert parts.count("report") == parts.count("selection") == len(study.proofs())


def test_a_weight_that_two_linears_share_is_one_layer_of_a_plan(studied):
    plan = studied[0].plans()[0]
    shared = [layer for layer in plan.layers if len(layer.parameters) > 1]
    assert [set(layer.parameters) for layer in shared] == [{"second.weight", "again.weight"}]
    assert len(plan.layers) == 3


def test_the_searched_module_and_the_process_are_left_as_they_were(search, teacher):
    module = copy.deepcopy(teacher).train().requires_grad_(True)
    module.first.bias.requires_grad_(False)
    module.first.weight.grad = torch.ones_like(module.first.weight)
    module.second.register_forward_hook(lambda *_: None)
    loggers = [logging.getLogger(name) for name in ("optuna", "sqlalchemy", "alembic", "torch")]

    def state():
        return {
            "modes": [part.training for part in module.modules()],
            "gradients": [p.requires_grad for p in module.parameters()],
            "kept gradients": [p.grad is not None for p in module.parameters()],
            "hooks": [len(part._forward_hooks) for part in module.modules()],
            "tensors": [id(tensor) for tensor in (*module.parameters(), *module.buffers())],
            "python": random.getstate(),
            "torch": torch.get_rng_state().tolist(),
            "numpy": numpy.random.get_state()[1].tolist(),
            "levels": [logger.level for logger in loggers],
            "disabled": logging.root.manager.disable,
            "filters": list(warnings.filters),
        }

    found = state()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    search(module)
    assert state() == found
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(type(parameter.data) is torch.Tensor for parameter in module.parameters())


def test_a_compiled_module_is_searched_inside(search, teacher):
    module = copy.deepcopy(teacher)
    module.compile(backend="eager")
    compiled = torch.compile(copy.deepcopy(teacher), backend="eager")
    assert search(module).study_id == search(compiled).study_id


def test_the_best_plan_is_within_the_limit_and_can_be_applied(studied, teacher, quality):
    study, _ = studied
    plan = study.best(max_ppl_increase=0.5)
    proof = study.proofs()[plan.plan_id]
    assert plan.kind == "original" or proof.selection_increase.high <= 0.5
    module = autoquant.apply(plan, copy.deepcopy(teacher))
    losses = quality(module, "report")
    assert losses.mean().item() == pytest.approx(proof.loss, rel=0.02)


def test_limits_are_held_against_what_selection_says_of_as_many_samples_as_the_report_has(
    studied, teacher, quality
):
    study, _ = studied
    losses = {plan.label: study.proofs()[plan.plan_id].selection_losses for plan in study.plans()}
    uniform = next(plan for plan in study.plans() if plan.kind == "uniform")
    found = study.proofs()[uniform.plan_id].selection_increase
    unseen = len(quality(teacher, "report"))
    expected = paired_increase(
        losses[uniform.label], losses["original"], logarithmic=False, unseen=unseen
    )
    assert found.high == pytest.approx(expected.high) and found.low == pytest.approx(expected.low)


def test_applying_keeps_shared_weights_shared(studied, teacher):
    uniform = next(plan for plan in studied[0].plans() if plan.label.startswith("uniform int8"))
    module = autoquant.apply(uniform, copy.deepcopy(teacher))
    assert module.second.weight is module.again.weight
    assert type(module.second.weight.data) is not torch.Tensor


def test_a_limit_that_nothing_meets_says_so(studied):
    with pytest.raises(PlanError, match="smallest"):
        studied[0].best(max_memory_bytes=1)


def test_the_front_is_a_table_without_perplexities(studied):
    frame = studied[0].pareto()
    assert len(frame) >= 2 and frame["perplexity"].isna().all()
    assert frame["on_front"].any()
    assert (frame["perplexity_increase_low"] <= frame["perplexity_increase_high"]).all()


def test_the_same_search_again_asks_the_users_function_nothing(search):
    first = search()
    CALLS.clear()
    again = search(max_ppl_increase=0.2)
    assert again.study_id == first.study_id
    assert CALLS == []


def test_another_module_is_another_study(search, studied):
    torch.manual_seed(1)
    assert studied[0].study_id != search(Perceptron().eval()).study_id


def test_a_module_that_text_cannot_judge_is_told_to_leave_it_out(search, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 " * 100)
    with pytest.raises(TextError, match=r"leave out --eval-text .* or give --quality"):
        search(quality=None, eval_text=text)


def test_a_module_without_sample_inputs_is_refused_before_a_database_is_made(search, tmp_path):
    with pytest.raises(WorkloadError, match="sample_inputs"):
        search(sample_inputs=None)
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_linears_is_refused(search):
    def any_loss(module, part):
        return module(SAMPLES[part]).square().mean(dim=1)

    with pytest.raises((WorkloadError, ModelError), match="no linear"):
        search(torch.nn.Sequential(torch.nn.ReLU()), quality=any_loss)


def test_progress_is_told_in_events_and_never_printed(search, capfd):
    from autoquant.events import StageFinished, StageStarted

    events = []
    search(listener=events.append)
    started = [event.stage for event in events if isinstance(event, StageStarted)]
    finished = [event.stage for event in events if isinstance(event, StageFinished)]
    stages = ["record", "profile", "score", "prove", "refine", "deliver"]
    assert list(dict.fromkeys(started)) == stages
    assert set(finished) == set(started)
    assert capfd.readouterr().out == ""


def test_a_whole_workload_can_be_given_as_a_record(search):
    from autoquant import Phase, Workload

    study = search(workload=Workload(phases=(Phase(name="forward", tokens=0, calls=3),)))
    plan = study.plans()[0]
    proof = study.proofs()[plan.plan_id]
    assert proof.request_ms == pytest.approx(3 * proof.phase_ms["forward"])


def test_a_quality_function_takes_no_sensitivity_that_needs_gradients(search, tmp_path):
    from autoquant.errors import QualityError

    for name, advice in (
        ("fisher", "needs a text"),
        ("guess", "choose one of isolated, fisher, path"),
    ):
        with pytest.raises(QualityError, match=advice):
            search(sensitivity=name)
    assert not (tmp_path / "plan.db").exists()


def test_the_search_ends_with_the_plans_as_the_database_has_them(search, monkeypatch):
    """On GPUs plans are written once more at the end, with settled routes: the unquantized one's calibrated prediction too."""
    ended = {}
    monkeypatch.setattr(flow, "measure_crossovers", lambda ledger, *_: ended.update(ledger.plans))
    study = search(time_budget_s=0.0)
    proven = study.proofs()
    assert {i: plan.prediction for i, plan in ended.items()} == {
        p.plan_id: p.prediction for p in study.plans()
    }
    [original] = [plan for plan in ended.values() if plan.kind == "original"]
    assert original.prediction.request_ms == pytest.approx(
        proven[original.plan_id].request_ms, rel=0.01
    )


@pytest.mark.processes
def test_the_first_use_changes_no_level_and_no_filter():
    """What libraries set when they are imported is undone, too."""
    code = """
import logging, warnings
names = ("torch", "torchao", "transformers", "optuna", "sqlalchemy", "alembic")
state = lambda: [len(warnings.filters), *(logging.getLogger(name).level for name in names)]
import torch, autoquant
before = state()
autoquant.search, autoquant.apply, autoquant.load
assert state() == before, (before, state())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
