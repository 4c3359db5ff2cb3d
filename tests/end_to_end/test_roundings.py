"""Searches that may round weights for what their layers read, and what becomes of their plans."""

from __future__ import annotations

import sqlite3

import pytest
import torch

import autoquant
from autoquant.candidates import select
from autoquant.candidates.flat import flatten_tensor
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.on_disk import apply_to_disk
from autoquant.errors import PlanError
from autoquant.models import load_model
from autoquant.tuner import judge

from . import quick
from .tiny import save_llama, save_text

NEAREST, GPTQ = "int3-g32/bit-planes", "int3-g32-gptq/bit-planes"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("small")
    return save_llama(place / "model", layers=1), save_text(place / "text.txt", windows=60)


@pytest.fixture(scope="module")
def study(files, tmp_path_factory):
    with quick.short():
        return quick.search(
            *files,
            tmp_path_factory.mktemp("searched") / "plan.db",
            candidates=("int3-g32", "int3-g32-gptq"),
        )


def of_format(study, format_id):
    (plan,) = [
        plan for plan in study.plans() if plan.kind == "uniform" and format_id in plan.formats()
    ]
    return plan


def bits(model):
    return [
        part
        for parameter in model.parameters()
        if isinstance(parameter.data, RoutedWeight)
        for part in flatten_tensor(parameter.data)[0]
    ]


def test_a_layer_is_rounded_as_suits_it(study):
    options = study.store.options(study.study_id)
    fronts = [plan for plan in study.plans() if plan.kind == "front"]
    assert any(GPTQ in plan.formats() for plan in fronts)
    for layer in (
        layer for plan in fronts for layer in plan.layers if layer.format in (NEAREST, GPTQ)
    ):
        losses = {option.format: option.loss for option in options[layer.name]}
        assert layer.loss == min(losses[NEAREST], losses[GPTQ])
    proofs = study.proofs()
    assert proofs[of_format(study, GPTQ).plan_id].kl < proofs[of_format(study, NEAREST).plan_id].kl


def test_roundings_of_one_format_are_timed_once_and_take_as_long(study):
    connection = sqlite3.connect(study.store.engine.url.database)
    timed = {name for (name,) in connection.execute("SELECT DISTINCT format FROM timing")}
    connection.close()
    assert NEAREST in timed and GPTQ not in timed
    for layers in study.store.options(study.study_id).values():
        by_format = {option.format: (option.latency_us, option.memory_bytes) for option in layers}
        assert by_format.get(GPTQ) == by_format.get(NEAREST)


def test_a_plan_is_applied_from_the_database_with_the_same_bits_every_time(study, files, tmp_path):
    plan = of_format(study, GPTQ)
    models = [
        autoquant.apply(
            plan, load_model(files[0], dtype="bf16").module, calibration=study.calibration
        )
        for _ in range(2)
    ]
    apply_to_disk(plan, files[0], tmp_path / "out", facts=study.facts)
    models.append(autoquant.load(tmp_path / "out"))
    first, *others = map(bits, models)
    assert len(first) == 2 * len(
        [name for layer in plan.layers if layer.format == GPTQ for name in layer.parameters]
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_plan_without_its_text_is_refused_and_nothing_is_changed(study, files):
    model = load_model(files[0], dtype="bf16").module
    with pytest.raises(
        PlanError, match=r"rounded for their layers' inputs \(int3-g32-gptq\): .*=study.calibration"
    ):
        autoquant.apply(of_format(study, GPTQ), model)
    assert not bits(model)
    autoquant.apply(of_format(study, NEAREST), model)  # needs none


def test_a_quality_function_leaves_them_out_and_says_why():
    events = []
    pairs = select(("int3-g32", "int3-g32-gptq", "int3-g32-hqq"), "cpu")
    kept = judge._without_inputs(pairs, events.append)
    assert [each.format.id for each in kept] == [NEAREST, "int3-g32-hqq/bit-planes"]
    assert [event.text for event in events] == [
        f"{GPTQ} not considered: it is rounded for what layers read on a text, and there is none"
    ]
