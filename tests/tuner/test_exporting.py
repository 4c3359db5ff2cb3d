"""Exports with layers rounded anew: quality is proven again, on the texts of the search."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from delivery.targets.conftest import Planned, save_llama

from autoquant.errors import PlanError, TextError
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.solver.limits import Limits
from autoquant.tuner.exporting import RequantizedReport, export
from autoquant.tuner.judge import Asked, make_judge

INT4 = ("int4-g32/lanes", "unpack-matmul")
INT8 = ("int8-row/plain", "dequantize-matmul", "int-mm")
FORMATS = {"q_proj": INT4, "o_proj": INT4, "down_proj": INT8}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """What is needed of a study whose plan has int4 with zero points."""
    planned = Planned(save_llama(tmp_path_factory.mktemp("model"), tied=True))
    judge = make_judge(
        Asked.of(None, None, None), load_model(planned.folder, device="cpu"), [], 0, ignore
    )
    identity = {"candidates": [], "seed": 0, "quality": judge.quality.key}
    limits = Limits(max_ppl_increase=0.5)
    facts = SimpleNamespace(**vars(planned.facts), identity=identity, limits=limits.as_object())
    return SimpleNamespace(
        facts=facts,
        limits=limits,
        study_id="s",
        store=SimpleNamespace(references=lambda _: {"judge": {"words": "some text (key abc)"}}),
        best_of_search=lambda: planned.plan(FORMATS),
    )


def test_what_cannot_be_held_is_refused_unless_it_is_asked_for(study, tmp_path):
    with pytest.raises(PlanError, match="round these layers anew with --requantize"):
        export(study, tmp_path / "out", to="compressed-tensors")


def test_quality_is_measured_of_what_was_written(study, tmp_path):
    report = export(study, tmp_path / "out", to="compressed-tensors", requantize=True)
    assert isinstance(report, RequantizedReport)
    assert report.export.schemes["int4s-g32 as pack-quantized"] == 4
    [((before, after, _), count)] = report.changes.items()
    assert (before, after, count) == ("int4-g32", "int4s-g32", 4)
    assert report.of_plan.loss != report.result.loss
    assert math.isclose(report.of_plan.loss, report.result.loss, rel_tol=0.05)
    first, second = report.quality
    shown = f"{math.exp(report.result.loss):.4g} ({100 * report.result.increase.value:+.2f} %)"
    assert shown in first and "the limit is 50 %" in second


def test_beyond_the_limit_nothing_is_written_and_the_error_says_by_how_much(study, tmp_path):
    with pytest.raises(PlanError, match=r"is beyond -50 %.*nothing was written.*--for vllm"):
        export(
            study,
            tmp_path / "out",
            to="compressed-tensors",
            requantize=True,
            max_ppl_increase=-0.5,
        )
    assert not list(tmp_path.iterdir())


def test_another_text_than_that_of_the_search_is_refused(study, tmp_path):
    other = SimpleNamespace(**vars(study))
    other.facts = SimpleNamespace(**vars(study.facts))
    other.facts.identity = {**study.facts.identity, "quality": "another"}
    with pytest.raises(TextError, match=r"another measure \(some text.*--eval-text"):
        export(other, tmp_path / "out", to="compressed-tensors", requantize=True)
    assert not list(tmp_path.iterdir())


def test_a_plan_that_is_held_is_exported_without_measuring(study, tmp_path):
    plan = study.best_of_search()
    layers = tuple(
        each if each.format == "int8-row/plain" else _unquantized(each) for each in plan.layers
    )
    report = export(
        study,
        tmp_path / "out",
        to="compressed-tensors",
        plan=replace(plan, layers=layers),
        requantize=True,
    )
    assert not report.changes and not report.quality


def _unquantized(layer):
    route = (replace(layer.route[0], kernel="matmul", upper_m=None),)
    return replace(layer, format="bfloat16/plain", route=route)


def test_activations_of_mixed_routes_are_rounded_or_not_as_asked(study, tmp_path):
    plan = study.best_of_search()
    layers = tuple(
        each if each.format == "int8-row/plain" else _unquantized(each) for each in plan.layers
    )
    plan = replace(plan, layers=layers)
    notes = {}
    for activations in ("rounded", "a16"):
        report = export(
            study,
            tmp_path / activations,
            to="compressed-tensors",
            plan=plan,
            activations=activations,
        )
        notes[activations] = report.notes[0]
        name = "int-quantized" if activations == "rounded" else "pack-quantized"
        assert report.schemes == {f"int8-row as {name}": 2}
    assert "as a8-row here (--activations a16 does not round it)" in notes["rounded"]
    assert "as a16 here (--activations rounded rounds it)" in notes["a16"]
