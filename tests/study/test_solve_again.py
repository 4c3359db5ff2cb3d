"""A finished search solved for other limits, without its model."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
from builders.records import STUDY
from builders.search import CONTEXT, choice, make_plan, make_proof

from autoquant.errors import PlanError
from autoquant.records import Interval
from autoquant.solver.limits import Limits
from autoquant.solver.space import SearchSpace
from autoquant.study.solve_again import AROUND, solve_again
from autoquant.study.study import Study


def layers(count, formats, seed=0):
    """Layers of a model: options whose time and size go with their shape and format, and whose loss is their own."""
    draw = random.Random(seed)
    kinds = [(draw.uniform(0.5, 2.0), 10 ** draw.uniform(3, 4)) for _ in range(7)]
    made = []
    for number in range(count):
        scale, us = kinds[number % len(kinds)]
        layer = [choice(f"l.{number}", us=us, memory=int(scale * 16_000))]
        for index in range(1, formats):
            bits = 2 + (index * 6) // formats
            loss = 10 ** draw.uniform(-1, 0) * 4.0**-bits
            layer.append(
                choice(
                    f"l.{number}",
                    f"f{index}/plain",
                    us * draw.uniform(0.2, 1.1),
                    loss,
                    int(scale * 1000 * bits),
                )
            )
        made.append(layer)
    return made


@pytest.fixture
def finished(store):
    """A study of so many layers with so many options each, of which one uniform plan was proven."""

    def make(count=6, formats=5):
        space = SearchSpace(layers(count, formats), CONTEXT, logarithmic=True)
        store.put_options(STUDY, space.options, space.about())
        store.put_plan(make_plan("a", "uniform a", "uniform", layers=(choice(loss=0.01),)))
        proof = make_proof("a", increase=0.02, high=0.02)
        store.put_proof(
            "a", replace(proof, selection_kl=Interval(value=0.018, low=0.016, high=0.02))
        )
        return Study(store, STUDY)

    return make


def summed_loss(study, plan):
    """What was predicted for the plan's layers, before it was compared with what is measured."""
    predicted = {
        (each.name, each.format): each.loss for layer in study.space().options for each in layer
    }
    return sum(predicted[layer.name, layer.format] for layer in plan.layers)


def test_the_plan_is_within_the_limits_as_predicted_and_kept_unproven(finished, store):
    study = finished()
    solved = solve_again(study, Limits(max_ppl_increase=0.02))
    assert 0 < summed_loss(study, solved.plan) <= 0.01 * 1.001, (
        "measured are twice the predicted losses"
    )
    assert (solved.plan.kind, solved.plan.label) == (
        "solved",
        "solved: fastest with increase at most 2%",
    )
    assert study.plan(solved.plan.plan_id) == solved.plan
    assert not solved.proven and solved.plan.plan_id not in study.proofs()
    assert study.recommended() is None or study.recommended().plan_id != solved.plan.plan_id


def test_another_limit_gives_another_plan_and_those_around_are_ordered(finished):
    study = finished()
    tight, loose = (
        solve_again(study, Limits(max_ppl_increase=limit), AROUND) for limit in (0.001, 0.01)
    )
    assert tight.plan.prediction.loss < loose.plan.prediction.loss
    assert tight.plan.prediction.request_ms > loose.plan.prediction.request_ms
    losses = [plan.prediction.loss for plan in loose.around]
    assert losses == sorted(losses) and loose.plan in loose.around and len(losses) > 2


def test_a_limit_of_divergence_goes_by_what_was_measured_of_divergences(finished):
    study = finished()
    assert summed_loss(study, solve_again(study, Limits(max_kl=0.02)).plan) <= 0.01 * 1.001
    both = solve_again(study, Limits(max_kl=0.02, max_ppl_increase=0.002)).plan
    assert summed_loss(study, both) <= 0.001 * 1.001


def test_a_memory_limit_is_kept_and_the_smallest_can_be_asked_for(finished):
    study = finished()
    free = solve_again(study, Limits(max_ppl_increase=0.02)).plan
    limit = free.prediction.memory_bytes - 1
    assert (
        solve_again(
            study, Limits(max_ppl_increase=0.02, max_memory_bytes=limit)
        ).plan.prediction.memory_bytes
        <= limit
    )
    smallest = solve_again(study, Limits(max_ppl_increase=0.02, minimize="memory")).plan
    assert smallest.prediction.memory_bytes <= free.prediction.memory_bytes


def test_solving_twice_gives_the_same_plan_and_a_known_one_is_said_to_be_proven(finished, store):
    study = finished()
    first = solve_again(study, Limits(max_ppl_increase=0.02)).plan
    store.put_plan(replace(first, kind="front", label="front 1"))
    store.put_proof(first.plan_id, make_proof(first.plan_id))
    again = solve_again(study, Limits(max_ppl_increase=0.02))
    assert again.proven and (again.plan.plan_id, again.plan.label) == (first.plan_id, "front 1")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            Limits(max_memory_bytes=10),
            ["no plan is as small as 10 bytes", "allow at least that with --max-memory"],
        ),
        (
            Limits(max_ppl_increase=0.0, max_memory_bytes=60_000),
            ["increase at most 0%", "the smallest takes"],
        ),
    ],
)
def test_limits_that_nothing_meets_are_refused_with_what_would_do(finished, limits, words):
    study = finished()
    with pytest.raises(PlanError) as caught:
        solve_again(study, limits)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(
        caught.value
    )
    assert len(study.plans()) == 1, "nothing is kept"


def test_a_search_that_kept_nothing_to_solve_says_what_to_do(store):
    with pytest.raises(PlanError, match="run its search again"):
        solve_again(Study(store, STUDY), Limits())


def test_three_hundred_layers_of_forty_options_are_solved_again_in_less_than_a_second(finished):
    study = finished(300, 40)
    seconds = []
    for increase in (0.005, 0.01, 0.02):
        started = time.process_time()
        assert solve_again(study, Limits(max_ppl_increase=increase)).plan.prediction.loss > 0
        seconds.append(time.process_time() - started)
    assert sorted(seconds)[1] < 1.0, seconds
