"""What the first proven plans teach about the time of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.records import make_choice, make_proof, make_site

from autoquant.records import (
    LayerChoice,
    LinearShape,
    Phase,
    Proof,
    RouteStep,
    SiteUse,
    Workload,
)
from autoquant.solver.planning import PlanContext, make_plan
from autoquant.tuner.time_scale import TimeScale, candidate_of, fit_time_scale

SHAPE = LinearShape(n=64, k=64, bias=False, dtype="bfloat16")
SITES = tuple(make_site(f"l{i}", uses=(SiteUse(phase="decode", m=1, calls=1),)) for i in range(4))
WORKLOAD = Workload(phases=(Phase(name="decode", tokens=1, calls=10),))
CONTEXT = PlanContext(
    study_id="s", model_hash="h", dtype="bfloat16", workload=WORKLOAD, other_bytes=0
)


def choices(format_id: str, us: float) -> list[LayerChoice]:
    route = (RouteStep(upper_m=None, kernel="k"),)
    return [
        make_choice(site.name, format_id, route=route, latency_us={"decode": us}, memory_bytes=1)
        for site in SITES
    ]


def proof(plan_id: str, decode_ms: float, original_ms: float) -> Proof:
    return make_proof(
        plan_id,
        ms=10 * decode_ms,
        phase_ms={"decode": decode_ms},
        original_ms=10 * original_ms,
        original_phase_ms={"decode": original_ms},
    )


def test_with_the_original_alone_the_rest_is_what_its_linears_leave():
    original = make_plan(choices("bf16/plain", 500.0), "original", "original", CONTEXT)
    found = fit_time_scale([original], {original.plan_id: proof(original.plan_id, 3.0, 3.0)}, SITES)
    assert found.rest_ms["decode"] == pytest.approx(1.0, rel=0.05)
    assert found.factor("decode", "bf16/plain/k") == pytest.approx(1.0, rel=0.05)


def test_the_rest_is_never_negative_when_layers_alone_are_slower_than_the_model():
    original = make_plan(choices("bf16/plain", 1000.0), "original", "original", CONTEXT)
    found = fit_time_scale([original], {original.plan_id: proof(original.plan_id, 2.0, 2.0)}, SITES)
    assert found.rest_ms["decode"] >= 0
    assert found.predicted(original, SITES, CONTEXT).prediction.request_ms == pytest.approx(
        20.0, rel=0.05
    )


def test_a_candidate_that_gains_less_in_the_model_than_alone_gets_the_larger_factor():
    original = make_plan(choices("bf16/plain", 500.0), "original", "original", CONTEXT)
    small = make_plan(choices("int8/plain", 100.0), "uniform", "uniform", CONTEXT)
    proofs = {
        original.plan_id: proof(original.plan_id, 3.0, 3.0),
        small.plan_id: proof(small.plan_id, 1.8, 3.0),
    }
    found = fit_time_scale([original, small], proofs, SITES)
    assert found.factor("decode", "int8/plain/k") > 1.2 * found.factor("decode", "bf16/plain/k")
    for plan, decode_ms in ((original, 3.0), (small, 1.8)):
        assert found.predicted(plan, SITES, CONTEXT).prediction.request_ms == pytest.approx(
            10 * decode_ms, rel=0.05
        )


def test_the_machines_drift_between_proofs_is_taken_out():
    original = make_plan(choices("bf16/plain", 500.0), "original", "original", CONTEXT)
    small = make_plan(choices("int8/plain", 100.0), "uniform", "uniform", CONTEXT)
    calm = {
        original.plan_id: proof(original.plan_id, 3.0, 3.0),
        small.plan_id: proof(small.plan_id, 1.5, 3.0),
    }
    drifted = calm | {small.plan_id: proof(small.plan_id, 3.0, 6.0)}
    before, after = (
        fit_time_scale([original, small], calm, SITES),
        fit_time_scale([original, small], drifted, SITES),
    )
    ratio = [
        c.rest_ms["decode"] + 0.4 * c.factor("decode", "int8/plain/k") for c in (before, after)
    ]
    scale = 6.0 / 3.0  # the reference is the later of the two originals
    assert ratio[1] == pytest.approx(ratio[0] * scale, rel=0.05)


def test_a_prediction_goes_with_the_unquantized_models_time_and_becomes_slower_with_it():
    original = make_plan(choices("bf16/plain", 500.0), "original", "original", CONTEXT)
    small = make_plan(choices("int8/plain", 100.0), "uniform", "uniform", CONTEXT)
    found = fit_time_scale([original], {original.plan_id: proof(original.plan_id, 3.0, 3.0)}, SITES)
    prediction = found.predicted(small, SITES, CONTEXT).prediction
    assert prediction.original_request_ms == pytest.approx(30.0)
    assert prediction.request_ms_beside(60.0) == pytest.approx(2 * prediction.request_ms)
    assert small.prediction.original_request_ms is None
    assert small.prediction.request_ms_beside(60.0) == small.prediction.request_ms


def test_a_candidate_that_no_proven_plan_used_gets_the_median_factor():
    scale = TimeScale(
        {"decode": 1.0}, {("decode", "a"): 0.5, ("decode", "b"): 0.7, ("decode", "c"): 2.0}
    )
    assert scale.factor("decode", "new") == 0.7
    assert scale.factor("prefill", "new") == 1.0


def test_a_prediction_changes_neither_the_plans_id_nor_its_layers():
    plan = make_plan(choices("int8/plain", 100.0), "uniform", "uniform", CONTEXT)
    changed = TimeScale({"decode": 2.0}, {("decode", "int8/plain/k"): 3.0}).predicted(
        plan, SITES, CONTEXT
    )
    assert changed.prediction.request_ms == pytest.approx(10 * (2.0 + 4 * 0.3))
    assert (changed.plan_id, changed.layers) == (plan.plan_id, plan.layers)


def test_the_kernel_that_does_most_of_a_phases_work_counts():
    uses = (SiteUse(phase="decode", m=1, calls=3), SiteUse(phase="decode", m=64, calls=1))
    route = (RouteStep(upper_m=8, kernel="small"), RouteStep(upper_m=None, kernel="large"))
    choice = replace(choices("int8/plain", 1.0)[0], route=route)
    assert candidate_of(choice, replace(SITES[0], uses=uses), "decode") == "int8/plain/large"
