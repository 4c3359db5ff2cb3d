"""A study in a store of its own."""

from __future__ import annotations

import pytest

from autoquant.store import open_store
from autoquant.study.study import Study

from .made_up import STUDY, fill, make_plan


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path / "plan.db")
    fill(opened)
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
