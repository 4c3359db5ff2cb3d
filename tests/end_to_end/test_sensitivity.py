"""Searches that ask another sensitivity, on the same database."""

from __future__ import annotations

import sqlite3

import pytest

from autoquant.evaluators.sensitivity import EVERY_LAYER, SENSITIVITIES, fisher
from autoquant.events import StageFinished
from autoquant.solver.additivity import fit_loss_map, together_pairs

from . import quick
from .tiny import save_llama, save_text


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("small")
    return save_llama(place / "model", layers=1), save_text(place / "text.txt", windows=16)


@pytest.mark.parametrize("method", ["fisher", "path"])
def test_a_search_predicts_plans_by_the_sensitivity_asked_for(files, tmp_path, method, monkeypatch):
    monkeypatch.setattr(fisher, "_LEAST_ROWS", 60)
    events = []
    study = quick.search(*files, tmp_path / "plan.db", sensitivity=method, listener=events.append)
    (said,) = [
        event.summary
        for event in events
        if isinstance(event, StageFinished) and event.stage == "score"
    ]
    assert said.startswith(f"sensitivity {method}: ")
    assert study.facts.identity["method"] == SENSITIVITIES[method].version
    connection = sqlite3.connect(tmp_path / "plan.db")
    rows = connection.execute("SELECT method, layer, numerics, loss FROM loss").fetchall()
    connection.close()
    assert {row[0] for row in rows} == {SENSITIVITIES[method].version}
    losses = {(layer, numerics): loss for _, layer, numerics, loss in rows}
    loss_map = fit_loss_map(together_pairs(losses, EVERY_LAYER))
    plans = [plan for plan in study.plans() if plan.kind != "original"]
    assert plans
    for plan in plans:
        assert plan.prediction.loss == pytest.approx(
            loss_map.plan_loss(sum(layer.loss for layer in plan.layers))
        )
