"""Estimates with intervals."""

import math

import numpy as np
import pytest
from scipy import stats

from autoquant.intervals import mean_interval, paired_increase


def test_an_increase_of_plain_losses_follows_the_formula():
    # differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
    found = paired_increase([11.0, 22.0, 33.0], [10.0, 20.0, 30.0], logarithmic=False)
    half = 4.30265273 / math.sqrt(3)
    assert found.value == pytest.approx(2 / 20)
    assert found.low == pytest.approx((2 - half) / 20) and found.high == pytest.approx(
        (2 + half) / 20
    )


def test_an_increase_of_log_likelihoods_is_that_of_perplexity():
    found = paired_increase([2.1, 3.2, 4.3], [2.0, 3.0, 4.0], logarithmic=True)
    half = 0.430265273 / math.sqrt(3)
    assert found.value == pytest.approx(math.exp(0.2) - 1)
    assert found.low == pytest.approx(math.exp(0.2 - half) - 1) and found.high == pytest.approx(
        math.exp(0.2 + half) - 1
    )


@pytest.mark.parametrize("count", [2, 5, 32, 100])
def test_the_interval_is_students_of_the_paired_differences(count):
    random = np.random.default_rng(count)
    reference = random.normal(3, 1, count)
    losses = reference + random.normal(0.02, 0.05, count)
    expected = stats.ttest_rel(losses, reference).confidence_interval(0.95)
    found = paired_increase(losses.tolist(), reference.tolist(), logarithmic=True)
    assert found.low == pytest.approx(math.expm1(expected.low)) and found.high == pytest.approx(
        math.expm1(expected.high)
    )
    found = paired_increase(losses.tolist(), reference.tolist(), logarithmic=False)
    assert found.low == pytest.approx(expected.low / reference.mean())
    assert found.high == pytest.approx(expected.high / reference.mean())
    assert found.value == pytest.approx((losses - reference).mean() / reference.mean())


@pytest.mark.parametrize("logarithmic", [True, False])
def test_the_interval_covers_the_truth_95_times_in_100(logarithmic):
    random = np.random.default_rng(7)
    trials, count, truth = 2000, 12, 0.01
    reference = np.tile(np.linspace(2, 4, count), (trials, 1))
    losses = reference + random.normal(truth, 0.02, (trials, count))
    wanted = math.expm1(truth) if logarithmic else truth / 3
    covered = 0
    for a, b in zip(losses.tolist(), reference.tolist(), strict=True):
        found = paired_increase(a, b, logarithmic=logarithmic)
        covered += found.low <= wanted <= found.high
    assert 0.938 < covered / trials < 0.962


def test_equal_losses_are_no_increase():
    found = paired_increase([2.0, 3.0], [2.0, 3.0], logarithmic=True)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("logarithmic", [True, False])
def test_one_sample_says_nothing_of_the_interval(logarithmic):
    found = paired_increase([2.2], [2.0], logarithmic=logarithmic)
    assert found.value == pytest.approx(math.expm1(0.2) if logarithmic else 0.1)
    assert found.low == (-1.0 if logarithmic else -math.inf) and found.high == math.inf


def test_hopeless_losses_do_not_overflow():
    found = paired_increase([1000.0, 1.0], [1.0, 1.0], logarithmic=True)
    assert found.high == math.inf and found.low == -1.0


def test_a_mean_reference_of_zero_or_less_keeps_the_sign():
    assert paired_increase([1.0, 1.0], [0.0, 0.0], logarithmic=False).value == 1.0
    assert paired_increase([-1.0, -1.0], [-2.0, -2.0], logarithmic=False).value == pytest.approx(
        0.5
    )


@pytest.mark.parametrize(("losses", "reference"), [([], []), ([1.0], [1.0, 2.0])])
def test_samples_that_do_not_pair_are_an_error(losses, reference):
    with pytest.raises(ValueError, match="reference losses"):
        paired_increase(losses, reference, logarithmic=True)


@pytest.mark.parametrize("unseen", [3, 12, 40])
def test_the_interval_for_unseen_samples_covers_their_mean_95_times_in_100(unseen):
    random = np.random.default_rng(unseen)
    trials, count = 3000, 12
    covered = {"unseen": 0, "all": 0}
    for _ in range(trials):
        seen, others = random.normal(0.01, 0.02, count), random.normal(0.01, 0.02, unseen)
        for name, more in (("unseen", unseen), ("all", 0)):
            found = paired_increase(seen.tolist(), [0.0] * count, logarithmic=True, unseen=more)
            covered[name] += found.low <= math.expm1(others.mean()) <= found.high
            samples = mean_interval(seen.tolist(), more)
            assert found.high == pytest.approx(math.expm1(samples.high))
    assert 0.938 < covered["unseen"] / trials < 0.962
    assert covered["all"] < covered["unseen"] - 0.02 * trials
