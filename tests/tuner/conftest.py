"""A study in a store of its own."""

from __future__ import annotations

import gc
import itertools
import shutil

import pytest
from builders.gated import make_setup
from builders.records import STUDY, put_study
from builders.search import make_plan

from autoquant.solver import front
from autoquant.store import open_store
from autoquant.study.study import Study
from autoquant.tuner.stages import refine


@pytest.fixture(scope="session")
def filled(tmp_path_factory):
    """The database that each test gets a copy of, which is quicker than making it."""
    path = tmp_path_factory.mktemp("filled") / "plan.db"
    made = open_store(path)
    put_study(made)
    made.close()
    return path


@pytest.fixture
def store(filled, tmp_path):
    opened = open_store(shutil.copy(filled, tmp_path / "plan.db"))
    yield opened
    opened.close()


@pytest.fixture
def study_of(store):
    """A study with these proofs; the plan of id `original` is the unquantized model."""

    def make(*proofs):
        for proof in proofs:
            kind = "original" if proof.plan_id == "original" else "front"
            label = "original" if kind == "original" else f"front {proof.plan_id}"
            store.put_plan(make_plan(proof.plan_id, label=label, kind=kind))
            store.put_proof(proof.plan_id, proof)
        return Study(store, STUDY)

    return make


@pytest.fixture
def events():
    return []


@pytest.fixture
def setup(tmp_path, events):
    """The setup of a search of three small linears, whose study its store knows."""
    made = make_setup(tmp_path / "plan.db", events.append)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def quick_collector():
    """What is in memory already is not searched for garbage, as the stages ask for often."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def quick_solver(monkeypatch):
    """Fewer points of the front are solved for, and plans are proposed without Optuna."""

    def propose(space, *, known, **_rest):
        sizes = [range(len(layer)) for layer in space.options]
        for number, picks in enumerate(itertools.product(*sizes)):
            plan = space.plan(picks, f"refined {number}", "refined")
            if plan.plan_id not in known:
                yield plan, lambda _proof: None

    monkeypatch.setattr(front, "LOSS_BUDGETS", 9)
    monkeypatch.setattr(refine, "proposals", propose)
