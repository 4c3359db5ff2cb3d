"""Predicted losses in the units of what uniform plans were measured to lose."""

from __future__ import annotations

import math

import pytest
from builders.search import CONTEXT, choice, make_plan, make_proof

from autoquant.solver.limits import Limits
from autoquant.solver.loss_scale import fit_loss_scale
from autoquant.solver.space import SearchSpace

LIMITS = Limits(max_ppl_increase=0.01)
PREDICTED = {"int8/plain": 0.004, "int4/plain": 0.008, "float8/plain": 0.006, "int3/plain": 0.02}
ROUNDED = "float8/plain"


def space(logarithmic=False):
    layer = [choice(), *(choice(fmt=fmt, loss=loss) for fmt, loss in PREDICTED.items())]
    return SearchSpace([layer], CONTEXT, logarithmic=logarithmic)


def proven(**measured):
    """Uniform plans by format, with what the interval of each ends at."""
    plans = {
        name: make_plan(
            name, f"uniform {name}", "uniform", layers=(choice(fmt=f"{name}/plain", loss=loss),)
        )
        for name in measured
        for loss in [PREDICTED[f"{name}/plain"]]
    }
    return plans, {name: make_proof(name, high=high) for name, high in measured.items()}


def losses(scale):
    scaled = scale.space(space())
    return {each.format: scaled.summed_loss([each]) for each in scaled.options[0][1:]}


def test_each_numerics_loses_what_its_uniform_plan_was_measured_to_lose():
    scale = fit_loss_scale(space(), LIMITS, *proven(int8=0.004, int4=0.004, float8=0.018))
    assert losses(scale) == pytest.approx(
        {"int8/plain": 0.004, "int4/plain": 0.004, "float8/plain": 0.018, "int3/plain": 0.02}
    )
    assert scale.allowed == 0.01


def test_numerics_without_a_proof_get_the_usual_factor():
    scale = fit_loss_scale(space(), LIMITS, *proven(int8=0.008, int4=0.016, float8=0.006))
    assert losses(scale)["int3/plain"] == pytest.approx(2 * 0.02)


@pytest.mark.parametrize("high", [-0.001, 0.0, 1e-9, 5.0])
def test_one_proof_does_not_move_losses_further_than_four_times(high):
    scale = fit_loss_scale(space(), LIMITS, *proven(int8=0.004, int4=0.008, float8=high))
    factor = 4 if high > 1 else 1 / 4
    assert losses(scale)[ROUNDED] == pytest.approx(factor * PREDICTED[ROUNDED])


def test_the_plan_solved_for_avoids_numerics_that_lose_more_than_was_predicted():
    def fastest(**measured):
        quick = [choice(), choice(fmt="int4/plain", us=500, loss=0.008)]
        quick.append(choice(fmt=ROUNDED, us=400, loss=0.006))
        options = SearchSpace([quick], CONTEXT)
        scale = fit_loss_scale(options, LIMITS, *proven(**measured))
        picks = scale.space(options).solve(
            "time", max_summed_loss=scale.allowed, max_memory_bytes=None
        )
        return options.options[0][picks[0]].format

    assert fastest(int4=0.008, float8=0.006) == ROUNDED
    assert fastest(int4=0.008, float8=0.012) == "int4/plain"


def test_an_increase_of_perplexity_is_compared_as_a_logarithm():
    scale = fit_loss_scale(space(logarithmic=True), LIMITS, {}, {})
    assert scale.allowed == pytest.approx(math.log(1.01))
    assert fit_loss_scale(space(), Limits(), {}, {}).allowed is None


def test_plans_of_several_numerics_tell_nothing():
    mixed = make_plan(
        "mixed",
        "uniform int4",
        "uniform",
        layers=(choice(fmt="int4/plain", loss=0.005), choice(fmt="int8/plain", loss=0.004)),
    )
    front = make_plan("own", layers=(choice(fmt="int4/plain", loss=0.005),))
    plans = {"mixed": mixed, "own": front}
    proofs = {name: make_proof(name, high=0.05) for name in plans}
    assert fit_loss_scale(space(), LIMITS, plans, proofs).factors == {}
