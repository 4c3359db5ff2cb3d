"""The stage that proves the best plan with keys and values in 8 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders.runner import FakeRunner, say_what_is_predicted
from builders.space import SITES, make_ledger, make_space
from models.tiny_models import as_loaded, tiny_llama

from autoquant.devices.cpu import CpuBackend
from autoquant.errors import WorkloadError
from autoquant.records import KV_CACHES, Interval
from autoquant.solver.limits import Limits
from autoquant.tuner.request import _check_kv_cache
from autoquant.tuner.stages.kv_caches import proofs_of_kv_caches, prove_kv_caches
from autoquant.tuner.stages.prove import prove_front, prove_references

pytestmark = pytest.mark.usefixtures("quick_solver", "quick_collector")
LIMITS = Limits(max_ppl_increase=0.01)
LOADED = as_loaded(tiny_llama())


def with_cache(time=0.8, loss=0.0):
    """Proofs in which a cache takes that share of the time, and loses so much more."""

    def prove(plan):
        proof = say_what_is_predicted(plan)
        if plan.kv_cache is None:
            return proof
        found = proof.selection_increase
        more = Interval(value=found.value + loss, low=found.low + loss, high=found.high + loss)
        return replace(proof, request_ms=proof.request_ms * time, selection_increase=more)

    return prove


@pytest.fixture
def search(store):
    """Prove a front and then the caches; gives the plans with a cache, and the ledger."""

    def run(prove, asked="auto", limit_s=1e6):
        runner = FakeRunner(prove=prove)
        ledger = make_ledger(store, runner, limit_s=limit_s)
        referenced = prove_references(make_space(), ledger, SITES, LIMITS)
        prove_front(referenced, ledger, LIMITS)
        ledger.store.update_study(ledger.study_id, limits=LIMITS.as_object())
        prove_kv_caches(asked, LOADED, ledger, LIMITS)
        return [plan for plan in runner.proven if plan.kv_cache], ledger

    return run


def test_the_best_plan_is_proven_with_each_format_and_recommended_if_it_is_faster(search):
    plans, ledger = search(with_cache())
    assert [plan.kv_cache for plan in plans] == list(KV_CACHES)
    assert plans[0].layers == plans[1].layers
    best = ledger.study.best_within(LIMITS)
    assert best.kv_cache in KV_CACHES and best in ledger.study.plans()  # as the store keeps it
    without = [plan for plan in ledger.plans.values() if plan.layers == best.layers]
    assert len({plan.plan_id for plan in without}) == 1 + len(KV_CACHES)
    rows = {row["plan_id"]: row["kv_cache"] for row in ledger.study.rows()}
    assert rows[best.plan_id] == best.kv_cache and None in rows.values()


def test_one_format_may_be_asked_for(search):
    plans, _ = search(with_cache(), asked="float8")
    assert [plan.kv_cache for plan in plans] == ["float8"]


def test_a_cache_that_is_no_faster_is_not_recommended(search):
    _, ledger = search(with_cache(time=1.2))
    assert ledger.study.best_within(LIMITS).kv_cache is None


def test_a_cache_that_loses_too_much_is_tried_on_a_plan_that_leaves_room(search):
    plans, ledger = search(with_cache(loss=0.008), asked="int8")
    first, second = plans
    assert not LIMITS.within(ledger.proofs[first.plan_id], first)
    assert LIMITS.within(ledger.proofs[second.plan_id], second)
    assert second.layers != first.layers


def test_what_is_known_is_not_proven_again_and_nothing_is_solved_from_it(search):
    first, _ = search(with_cache())
    again, ledger = search(with_cache())
    assert first and not again
    assert not any(plan.kv_cache for plan, _ in ledger.proven().values())
    assert any(plan.kv_cache for plan in ledger.plans.values())


def test_formats_that_the_device_or_the_model_cannot_have_are_left_out_or_refused(monkeypatch):
    assert proofs_of_kv_caches("auto", LOADED) == 2 and proofs_of_kv_caches("off", LOADED) == 0
    with pytest.raises(WorkloadError, match="no causal language model"):
        _check_kv_cache("auto", as_loaded(torch.nn.Linear(2, 2), kind="module"))
    monkeypatch.setattr(CpuBackend, "converts_float8", lambda _backend: False)
    assert proofs_of_kv_caches("auto", LOADED) == 1
    _check_kv_cache("auto", LOADED)
    with pytest.raises(WorkloadError, match="--kv-cache float8 cannot be searched"):
        _check_kv_cache("float8", LOADED)
