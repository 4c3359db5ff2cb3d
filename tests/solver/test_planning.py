"""Plans: what they are called, what they promise, which ones are made and why."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from builders.records import WORKLOAD
from builders.search import CONTEXT, choice

from autoquant.records import RouteStep
from autoquant.solver.front import front_plans, spread
from autoquant.solver.planning import explain, make_plan, predict, request_ms
from autoquant.solver.solve import AdditiveProblem
from autoquant.solver.space import SearchSpace
from autoquant.solver.uniform import original_plan, uniform_plans

INT8 = {"fmt": "int8/plain", "us": 600.0, "loss": 0.002, "memory": 50, "kernel": "weight-only"}
INT4 = {"fmt": "int4/plain", "us": 300.0, "loss": 0.05, "memory": 25, "kernel": "packed"}


def layers(count=4):
    """Options of some layers: the original, int8, and int4 in all but the first."""
    names = [f"model.layers.{number}.proj" for number in range(count)]
    return [
        [choice(name), choice(name, **INT8), *([choice(name, **INT4)] if number else [])]
        for number, name in enumerate(names)
    ]


def space(options):
    return SearchSpace(options, CONTEXT, originals(options))


def originals(options):
    return [layer[0] for layer in options]


def test_the_same_plan_has_the_same_id_whatever_it_is_called():
    options = layers()
    one = make_plan(originals(options), "one", "front", CONTEXT)
    relabelled = [
        replace(c, reason="another", latency_us={"prefill": 1.0}) for c in originals(options)
    ]
    assert make_plan(relabelled, "two", "refined", CONTEXT).plan_id == one.plan_id


def test_plans_that_do_something_else_have_other_ids():
    base = originals(layers())
    route = (RouteStep(upper_m=2, kernel="matmul"), RouteStep(upper_m=None, kernel="other"))
    variants = [
        base,
        base[:-1],
        [*base[:-1], replace(base[-1], format="int8/plain")],
        [*base[:-1], replace(base[-1], route=route)],
        [*base[:-1], replace(base[-1], route=(replace(route[0], upper_m=3), route[1]))],
        [*base[:-1], replace(base[-1], name="renamed")],
    ]
    ids = {make_plan(variant, "x", "front", CONTEXT).plan_id for variant in variants}
    ids.add(make_plan(base, "x", "front", replace(CONTEXT, study_id="another")).plan_id)
    assert len(ids) == len(variants) + 1


def test_predictions_are_sums():
    options = layers()
    chosen = [layer[-1] for layer in options]
    prediction = make_plan(chosen, "x", "front", CONTEXT).prediction
    assert prediction.linear_ms == pytest.approx(0.6 + 3 * 0.3)
    assert prediction.request_ms == pytest.approx(prediction.linear_ms + CONTEXT.rest_ms)
    assert prediction.loss == pytest.approx(0.002 + 3 * 0.05)
    assert prediction.memory_bytes == 50 + 3 * 25 + CONTEXT.other_bytes


def test_a_request_counts_every_decode_step():
    both = replace(choice(), latency_us={"prefill": 100.0, "decode": 10.0})
    assert request_ms(both, WORKLOAD) == pytest.approx((100.0 + 4 * 10.0) / 1e3)


def test_the_problem_and_the_prediction_agree():
    options = layers()
    problem = space(options).problem
    for picks in ((0, 0, 0, 0), (1, 2, 0, 1)):
        prediction = predict([layer[i] for layer, i in zip(options, picks, strict=True)], CONTEXT)
        time, loss, memory = problem.totals(picks)
        assert (time, loss) == pytest.approx((prediction.linear_ms, prediction.loss))
        assert memory == prediction.memory_bytes - CONTEXT.other_bytes


def test_the_original_plan_changes_nothing():
    options = layers()
    plan = original_plan(space(options))
    assert (plan.kind, plan.label) == ("original", "original")
    assert plan.formats() == {"bfloat16/plain": 4}


def test_there_is_a_uniform_plan_for_each_format_and_numerics():
    options = layers()
    rounded = dict(INT8, us=200.0, loss=0.004, kernel="integer", numerics="int8+a8-row")
    options = [[*layer, choice(layer[0].name, **rounded)] for layer in options]
    plans = {plan.label: plan for plan in uniform_plans(space(options))}
    assert set(plans) == {"uniform int8 a16", "uniform int8 a8-row", "uniform int4 a16"}
    assert all(plan.kind == "uniform" for plan in plans.values())
    assert {c.route[0].kernel for c in plans["uniform int8 a16"].layers} == {"weight-only"}
    assert {c.route[0].kernel for c in plans["uniform int8 a8-row"].layers} == {"integer"}


def test_a_layer_that_cannot_have_the_uniform_format_stays_unquantized():
    options = layers()
    plan = next(p for p in uniform_plans(space(options)) if "int4" in p.label)
    assert [c.format for c in plan.layers] == ["bfloat16/plain"] + ["int4/plain"] * 3
    assert "cannot be used" in plan.layers[0].reason


def test_a_uniform_plan_takes_the_fastest_route_of_its_format():
    options = [
        [*layer, choice(layer[0].name, **(INT8 | {"us": 500.0, "kernel": "faster"}))]
        for layer in layers()
    ]
    plan = next(p for p in uniform_plans(space(options)) if "int8" in p.label)
    assert {c.route[0].kernel for c in plan.layers} == {"faster"}


def test_uniform_plans_that_do_the_same_are_one():
    options = [[layer[0], layer[1], replace(layer[1], numerics="int8+other")] for layer in layers()]
    ids = [plan.plan_id for plan in uniform_plans(space(options))]
    assert len(ids) == len(set(ids))


def test_without_another_format_there_is_no_uniform_plan():
    options = [layer[:1] for layer in layers()]
    assert uniform_plans(space(options)) == []


def test_front_plans_begin_with_the_fastest_within_the_limits():
    plans = front_plans(space(layers()), count=5, max_loss=0.06, max_memory_bytes=None)
    assert plans[0].label == "front: fastest within limits"
    assert plans[0].formats() == {"int8/plain": 3, "int4/plain": 1}
    assert plans[0].prediction.loss <= 0.06


def test_front_plans_for_memory_begin_with_the_smallest_within_the_limits():
    plans = front_plans(
        space(layers()), count=5, max_loss=0.16, max_memory_bytes=None, minimize="memory"
    )
    assert plans[0].label == "front: smallest within limits"
    assert plans[0].formats() == {"int4/plain": 3, "int8/plain": 1}
    smallest = plans[0].prediction.memory_bytes
    plans = front_plans(
        space(layers()), count=1, max_loss=0.16, max_memory_bytes=smallest - 1, minimize="memory"
    )
    assert "within limits" not in plans[0].label


def test_front_plans_keep_to_the_memory_limit_of_the_whole_model():
    limit = CONTEXT.other_bytes + 4 * 50 - 1
    plan = front_plans(space(layers()), count=1, max_loss=None, max_memory_bytes=limit)[0]
    assert plan.prediction.memory_bytes <= limit


def test_limits_that_nothing_meets_leave_the_front_without_a_first_plan():
    plans = front_plans(space(layers()), count=3, max_loss=None, max_memory_bytes=1)
    assert plans and all("within limits" not in plan.label for plan in plans)


def test_front_plans_are_different_and_no_more_than_asked_for():
    plans = front_plans(space(layers(8)), count=6, max_loss=0.01, max_memory_bytes=None)
    assert len(plans) == len({plan.plan_id for plan in plans}) == 6
    assert len({plan.label for plan in plans}) == 6


def test_front_plans_say_why_for_every_layer():
    for plan in front_plans(space(layers()), count=4, max_loss=0.06, max_memory_bytes=None):
        assert all(layer.reason for layer in plan.layers)


def make_line(count=21):
    """One layer of options along a line from fast and inexact to slow and exact."""
    return AdditiveProblem.build([[(float(i), 2.0**-i, 1.0) for i in range(count)]]), [
        (i,) for i in range(count)
    ]


def test_spread_points_lie_far_from_each_other():
    problem, points = make_line()
    assert [p[0] for p in spread(problem, points, 3)] == [0, 20, 10]


def test_spread_keeps_away_from_points_already_taken():
    problem, points = make_line()
    chosen = spread(problem, points, 2, taken=[(0,)])
    assert (0,) not in chosen
    assert [p[0] for p in chosen] == [20, 10]


def test_a_limit_above_all_that_is_predicted_is_as_none():
    endless, none = (
        front_plans(space(layers()), count=4, max_loss=limit, max_memory_bytes=None)
        for limit in (math.inf, None)
    )
    assert [plan.plan_id for plan in endless] == [plan.plan_id for plan in none]


@pytest.mark.parametrize(("count", "wanted"), [(0, 0), (-1, 0), (3, 3), (100, 21)])
def test_spread_gives_as_many_points_as_there_are(count, wanted):
    problem, points = make_line()
    chosen = spread(problem, points, count)
    assert len(chosen) == len(set(chosen)) == wanted


def test_spread_copes_with_points_that_do_not_differ():
    problem = AdditiveProblem.build([[(1.0, 0.0, 1.0), (1.0, 0.0, 1.0)]])
    assert set(spread(problem, [(0,), (1,)], 2)) == {(0,), (1,)}
    assert spread(problem, [], 2) == []


def test_the_reason_names_what_the_neighbours_would_cost():
    _, options = layers(2)
    reason = explain(options[1], options, CONTEXT)
    assert "more exact bfloat16/plain would take +400 us a request for -0.002 loss" in reason
    assert "faster int4/plain would take -300 us for +0.048 loss" in reason


def test_the_reason_of_an_end_of_the_line_names_one_neighbour():
    _, options = layers(2)
    assert "faster" not in explain(options[2], options, CONTEXT)
    assert "more exact" not in explain(options[0], options, CONTEXT)


def test_the_reason_of_the_only_option_is_that_it_is_best():
    assert explain(choice(), [choice()], CONTEXT) == "fastest and most exact of all"


def test_multipliers_scale_the_losses_of_their_layers_only():
    options = layers(2)
    scaled = space(options).scaled({options[0][0].name: 3.0}).options
    assert [c.loss for c in scaled[0]] == pytest.approx([3 * c.loss for c in options[0]])
    assert scaled[1] == options[1]
    assert np.array_equal(space(scaled).problem.time[0], space(options).problem.time[0])
