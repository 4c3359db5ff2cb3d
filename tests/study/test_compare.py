"""What changes from one plan to another."""

from dataclasses import replace

import pytest
from builders.search import choice, make_plan

from autoquant.errors import PlanError
from autoquant.records import RouteStep, Workload
from autoquant.study.compare import changes, summed

WORKLOAD = Workload.parse("prefill=512,decode=10")


def plan_of(plan_id, *layers):
    return replace(make_plan(plan_id), layers=layers)


def timed(layer, prefill_us, decode_us):
    return replace(layer, latency_us={"prefill": prefill_us, "decode": decode_us})


def test_only_layers_of_another_format_or_route_change():
    kept, moved, rerouted = choice("a"), choice("b"), choice("c")
    other_route = (RouteStep(upper_m=None, kernel="other"),)
    before = plan_of("one", kept, moved, rerouted)
    after = plan_of(
        "two",
        replace(kept, loss=0.5, latency_us={"prefill": 1.0, "decode": 1.0}),
        choice("b", fmt="int8/plain"),
        replace(rerouted, route=other_route),
    )
    assert [change.after.name for change in changes(before, after, WORKLOAD)] == ["b", "c"]


def test_differences_are_of_a_whole_request_and_of_after_less_before():
    before = plan_of("one", timed(choice("a", memory=100, loss=0.25), 200.0, 30.0))
    after = plan_of("two", timed(choice("a", fmt="int8/plain", memory=40, loss=0.5), 100.0, 25.0))
    (change,) = changes(before, after, WORKLOAD)
    assert (change.request_us, change.loss, change.memory_bytes) == (-100.0 - 10 * 5.0, 0.25, -60)
    (back,) = changes(after, before, WORKLOAD)
    assert summed([change, back, change]) == (-150.0, 0.25, -60)


def test_layers_are_matched_by_name_not_by_place():
    a, b = choice("a"), choice("b", fmt="int8/plain")
    assert changes(plan_of("one", a, b), plan_of("two", b, a), WORKLOAD) == []


def test_plans_of_two_studies_are_not_compared():
    with pytest.raises(PlanError, match="compare plans of one study"):
        changes(plan_of("one"), replace(plan_of("two"), study_id="another1"), WORKLOAD)


def test_plans_of_other_layers_are_not_compared():
    with pytest.raises(PlanError, match="layer b: one is damaged"):
        changes(plan_of("one", choice("a"), choice("b")), plan_of("two", choice("a")), WORKLOAD)
