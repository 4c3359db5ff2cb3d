"""The hypervolume of a front, and when it has stopped growing."""

from __future__ import annotations

import random

import pytest

from autoquant.solver.hypervolume import Growth, hypervolume


def counted(points, reference, cells=200):
    """The same area by counting cells of a grid."""
    hit = sum(
        any(
            p[0] <= (i + 0.5) / cells * reference[0] and p[1] <= (j + 0.5) / cells * reference[1]
            for p in points
        )
        for i in range(cells)
        for j in range(cells)
    )
    return hit / cells**2 * reference[0] * reference[1]


def test_it_is_the_area_that_points_beat():
    draw = random.Random(0)
    points = [(draw.uniform(0, 2), draw.uniform(0, 3)) for _ in range(6)]
    assert hypervolume(points, (2.0, 3.0)) == pytest.approx(counted(points, (2.0, 3.0)), rel=0.02)


def test_beaten_points_equal_points_and_points_beyond_the_reference_add_nothing():
    alone = hypervolume([(1.0, 1.0)], (2.0, 2.0))
    assert alone == 1.0
    assert (
        hypervolume([(1.0, 1.0), (1.5, 1.5), (1.0, 1.0), (3.0, 0.0), (0.0, 2.0)], (2.0, 2.0))
        == alone
    )
    assert hypervolume([], (2.0, 2.0)) == 0.0


def test_a_front_has_ended_when_the_last_so_many_points_did_not_make_it_grow():
    growth = Growth([(1.0, 1.0)], (2.0, 2.0), patience=3, least_growth=0.01)
    for point in ((1.5, 1.5), None):
        growth.add(point)
        assert not growth.ended
    growth.add((0.5, 1.0))  # grows by half
    assert growth.last_growth == pytest.approx(0.5) and not growth.ended
    growth.add((0.499, 1.0))
    assert not growth.ended
    for _ in range(2):
        growth.add((1.9, 1.9))
    assert growth.last_growth < 0.01 and growth.ended


def test_nothing_that_stays_nothing_has_ended():
    growth = Growth([], (1.0, 1.0), patience=2, least_growth=0.01)
    growth.add((2.0, 2.0))
    growth.add((2.0, 2.0))
    assert growth.ended
