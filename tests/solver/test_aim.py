"""Solving again until the recommended plan is at the limit of quality."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.search import CONTEXT, choice, make_proof

from autoquant.records import Interval
from autoquant.solver.aim import CLOSE, TRIALS, _next_loss, _Shot, aimed, first_loss
from autoquant.solver.limits import Limits
from autoquant.solver.space import SearchSpace

LIMITS = Limits(max_ppl_increase=0.01)


def layers(count=24):
    """Each with an exact and a fast option, worth more or less the same, so that plans of nearly every loss exist."""
    made = []
    for number in range(count):
        fast = {
            "fmt": "int4/plain",
            "us": 500.0 - 7 * number,
            "loss": 0.001 + 0.00003 * number,
            "memory": 25,
        }
        made.append([choice(f"layer{number}"), choice(f"layer{number}", **fast)])
    return made


def prove(plan, law):
    """A proof whose interval ends where `law` says of the predicted loss."""
    return make_proof(
        plan.plan_id, ms=plan.prediction.request_ms, increase=law(plan.prediction.loss)
    )


def guess_of(options, law, guess, limits=LIMITS):
    """What is known before the first trial: the plan solved for a guess."""
    plan, _ = next(aimed(SearchSpace(options, CONTEXT), limits=limits, guess=guess, known={}))
    return {plan.plan_id: (plan, prove(plan, law))}


def take(options, law, guess, limits=LIMITS, known=None):
    """The plans of all trials, proven, the one of the guess first."""
    known = guess_of(options, law, guess, limits) if known is None else known
    proven = list(known.values())
    for plan, tell in aimed(SearchSpace(options, CONTEXT), limits=limits, guess=guess, known=known):
        proof = prove(plan, law)
        proven.append((plan, proof))
        tell(proof)
    return proven


def doubled(loss):
    return 2 * loss


def halved(loss):
    return loss / 2


def curved(loss):
    return 1.7 * loss**1.3 * 5


@pytest.mark.parametrize("law", [doubled, halved, curved])
def test_the_fastest_plan_within_the_limit_uses_nearly_all_of_it(law):
    options = layers()
    before, *after = take(options, law, guess=0.01)
    shares = [LIMITS.used(proof) for _, proof in (before, *after)]
    assert not CLOSE <= shares[0] <= 1, "the guess is off in all of these"
    assert 1 <= len(after) <= TRIALS
    assert max(share for share in shares if share <= 1) > 0.9
    if shares[0] < 1:
        within = [plan for plan, proof in after if LIMITS.used(proof) <= 1]
        assert min(plan.prediction.request_ms for plan in within) < before[0].prediction.request_ms


def test_a_guess_that_was_right_needs_no_trial():
    options = layers()
    (plan, _), *_ = guess_of(options, doubled, 0.01).values()
    scale = 0.0097 / plan.prediction.loss
    assert len(take(options, lambda loss: scale * loss, guess=0.01)) == 1


def test_without_a_limit_of_quality_there_is_nothing_to_aim_at():
    options = layers()
    limits = Limits(max_memory_bytes=10**6)
    assert list(aimed(SearchSpace(options, CONTEXT), limits=limits, guess=None, known={})) == []
    never = Limits(max_ppl_increase=0.0)
    assert (
        list(
            aimed(
                SearchSpace(options, CONTEXT),
                limits=never,
                guess=0.01,
                known=guess_of(options, doubled, 0.01),
            )
        )
        == []
    )


def test_the_fastest_of_all_being_within_the_limit_ends_it():
    options = layers()
    assert len(take(options, lambda loss: loss / 1000, guess=1.0)) == 1


def test_what_is_left_between_the_two_sides_must_be_worth_a_trial():
    """Quality jumps at a certain loss: no plan uses 95 % of the limit."""
    proven = take(layers(60), lambda loss: 0.02 if loss > 0.0083 else 0.004, guess=0.01)
    assert 2 <= len(proven) <= 1 + TRIALS
    within = [plan.prediction.loss for plan, proof in proven if LIMITS.used(proof) <= 1]
    assert max(within) > 0.005, "nearer than the first step to it"


def test_a_plan_that_cannot_be_proven_ends_it():
    options = layers()
    running = aimed(
        SearchSpace(options, CONTEXT),
        limits=LIMITS,
        guess=0.01,
        known=guess_of(options, doubled, 0.01),
    )
    _, tell = next(running)
    tell(None)
    assert next(running, None) is None


def test_what_is_proven_already_is_not_proven_again():
    options = layers()
    first = take(options, curved, guess=0.01)
    known = {plan.plan_id: (plan, proof) for plan, proof in first}
    again = take(options, curved, guess=0.01, known=known)
    assert [plan.plan_id for plan, _ in again] == list(known), "nothing but what was known"


def test_the_smallest_plan_is_aimed_at_too_and_memory_limits_are_kept_to():
    options = layers()
    limits = Limits(
        max_ppl_increase=0.01, max_memory_bytes=CONTEXT.other_bytes + 24 * 90, minimize="memory"
    )
    before, *after = take(options, halved, guess=0.01, limits=limits)
    assert after
    smaller = [plan.prediction.memory_bytes for plan, proof in after if limits.used(proof) <= 1]
    assert min(smaller) < before[0].prediction.memory_bytes <= limits.max_memory_bytes


def test_of_two_limits_the_tighter_one_is_aimed_at():
    both = Limits(max_ppl_increase=0.01, max_kl=0.02)
    proof = replace(
        make_proof("a", increase=0.005), selection_kl=Interval(value=0.01, low=0.01, high=0.03)
    )
    assert both.used(proof) == pytest.approx(1.5)
    assert Limits(max_ppl_increase=0.01).used(proof) == pytest.approx(0.5)
    assert Limits().used(proof) is None
    assert both.used(make_proof("a", high=float("inf"))) is None


def nearly_free(count=24):
    """As `layers`, but what is more exact takes next to no time."""
    made = layers(count)
    return [[replace(exact, latency_us=fast.latency_us), fast] for exact, fast in made]


def test_the_first_plan_leaves_room_to_the_limit_where_that_costs_next_to_nothing():
    allowed = sum(of[-1].loss for of in layers()) / 2
    assert first_loss(SearchSpace(nearly_free(), CONTEXT), LIMITS, allowed) == allowed / 2
    assert first_loss(SearchSpace(layers(), CONTEXT), LIMITS, allowed) == allowed
    assert first_loss(SearchSpace(layers(), CONTEXT), LIMITS, None) is None


def test_an_only_plan_is_predicted_to_lose_half_of_what_is_allowed():
    allowed = 0.004
    space = SearchSpace(layers(), CONTEXT)
    assert first_loss(space, LIMITS, allowed, only=True) == allowed / 2
    assert first_loss(space, LIMITS, None, only=True) is None


@pytest.mark.parametrize("further", [0.0, 1e-16, -0.001])
def test_measurements_that_contradict_the_predictions_end_it(further):
    """One plan is within the limit, and another that is predicted to lose no more is beyond it."""
    within, beyond = _Shot(0.01, 0.5, 10.0), _Shot(0.01 + further, 1.5, 5.0)
    assert _next_loss([within, beyond]) is None
    assert _next_loss([within, replace(beyond, loss=0.02)]) is not None


def test_a_plan_without_loss_does_not_tell_where_the_limit_is():
    lossless, beyond = _Shot(0.0, 0.1, 10.0), _Shot(0.01, 2.0, 5.0)
    assert _next_loss([lossless]) is None
    assert _next_loss([lossless, beyond]) == _next_loss([beyond]) == pytest.approx(0.004875)
