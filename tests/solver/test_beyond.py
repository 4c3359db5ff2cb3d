"""Which plans are stopped before all their windows were measured."""

import random

import pytest

from autoquant.solver.beyond import ERROR, looks, surely_beyond
from autoquant.solver.limits import Limits

ALL = 40
LIMIT = Limits(max_ppl_increase=0.01)


def stopped(differences, limits=LIMIT, divergences=()):
    """After how many windows a plan with these differences of losses is stopped; None for never."""
    for seen in sorted(looks(len(differences), 6)):
        if surely_beyond(
            limits,
            [3 + each for each in differences[:seen]],
            [3.0] * seen,
            divergences[:seen],
            logarithmic=True,
            unseen=len(differences) - seen,
        ):
            return seen
    return None


def windows(mean, spread, seed=0):
    draw = random.Random(seed)
    return [draw.gauss(mean, spread) for _ in range(ALL)]


@pytest.mark.parametrize(
    ("samples", "least", "after"),
    [(20, 6, {6, 10}), (60, 6, {7, 15, 30}), (84, 8, {10, 21, 42}), (6, 6, set()), (7, 6, {6})],
)
def test_looks_come_after_parts_of_the_windows_and_never_before_a_short_texts(
    samples, least, after
):
    assert looks(samples, least) == after


def test_the_further_a_plan_is_beyond_the_limit_the_earlier_it_is_stopped():
    assert stopped(windows(0.5, 0.01)) == 6
    assert stopped(windows(0.04, 0.01)) == 10
    assert stopped(windows(0.025, 0.009)) == 20
    assert stopped(windows(0.012, 0.01)) is None


def test_a_plan_within_the_limit_is_stopped_less_often_than_promised():
    """Its windows have a mean of just the limit."""
    trials = 4000
    wrong = 0
    for seed in range(trials):
        drawn = windows(0.0, 0.05, seed)
        shift = 0.00995 - sum(drawn) / ALL
        wrong += stopped([each + shift for each in drawn]) is not None
    assert wrong <= 3 * ERROR * trials


def test_divergence_is_looked_at_where_it_is_limited():
    differences, divergences = windows(0.0, 0.001), [abs(x) for x in windows(0.2, 0.01)]
    assert stopped(differences, Limits(max_kl=0.1), divergences) == 6
    assert stopped(differences, Limits(max_kl=0.3), divergences) is None
    assert stopped(differences, Limits(max_kl=0.1)) is None


def test_without_limits_of_quality_nothing_is_stopped():
    assert stopped(windows(5.0, 0.01), Limits(max_memory_bytes=1)) is None


def test_differences_that_are_not_finite_stop_nothing():
    assert stopped([float("nan")] * ALL) is None
