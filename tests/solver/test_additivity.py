"""From summed losses to the loss of a plan."""

import math

import pytest

from autoquant.solver.additivity import ADDITION, LossMap, fit_loss_map, together_pairs

SUMS = (1e-3, 0.05, 0.4, 2.0)


@pytest.mark.parametrize("curvature", [0.3, -0.2, 0.0, 4.0])
def test_a_map_is_found_from_what_it_gives(curvature):
    true = LossMap(curvature)
    found = fit_loss_map([(s, true.plan_loss(s)) for s in SUMS])
    assert found.curvature == pytest.approx(curvature, abs=1e-3)


@pytest.mark.parametrize("curvature", [0.3, -0.2, 0.0])
def test_a_map_rises_and_can_be_undone(curvature):
    loss_map = LossMap(curvature)
    losses = [loss_map.plan_loss(s) for s in SUMS]
    assert losses == sorted(losses)
    assert [loss_map.summed(loss) for loss in losses] == pytest.approx(SUMS)


def test_a_saturating_map_stops_below_its_ceiling():
    loss_map = LossMap(-0.25)
    assert loss_map.plan_loss(1e9) == pytest.approx(4.0)
    assert loss_map.summed(4.0) == math.inf


@pytest.mark.parametrize("pairs", [[], [(0.0, 0.0)], [(0.0, 0.1), (0.1, 0.0)]])
def test_without_anything_to_fit_losses_are_added(pairs):
    assert fit_loss_map(pairs) == ADDITION
    assert ADDITION.plan_loss(0.7) == ADDITION.summed(0.7) == 0.7


def test_relative_errors_count_alike_for_small_and_large_losses():
    exact = LossMap(0.3)
    pairs = [(s, exact.plan_loss(s)) for s in SUMS[:3]]
    off = fit_loss_map([*pairs, (2.0, exact.plan_loss(2.0) * 1.1)])
    assert off.plan_loss(0.4) == pytest.approx(exact.plan_loss(0.4), rel=0.05)


def test_sums_are_paired_with_what_was_measured_of_all_layers():
    losses = {("a", "x"): 0.1, ("b", "x"): 0.2, ("*", "x"): 0.35, ("a", "y"): 1.0}
    ((summed, measured),) = together_pairs(losses, "*")
    assert (summed, measured) == (pytest.approx(0.3), 0.35)
