import math
import random
from itertools import combinations

import pytest

from autoquant.report.front.labels import nearest_point, overlap, place_labels

BOUNDS = (0.0, 0.0, 800.0, 500.0)


@pytest.mark.parametrize("seed", range(5))
def test_crowded_labels_overlap_neither_one_another_nor_the_points(seed):
    draw = random.Random(seed)
    anchors = [(draw.uniform(150, 450), draw.uniform(100, 300)) for _ in range(16)]
    points = [(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    placed = place_labels(anchors, [(90.0, 12.0)] * len(anchors), points, BOUNDS)
    assert all(overlap(a, b) == 0 for a, b in combinations(placed, 2))
    assert all(overlap(label, point) == 0 for label in placed for point in points)


def test_a_label_in_a_corner_stays_inside():
    (box,) = place_labels([(798.0, 498.0)], [(90.0, 12.0)], [], BOUNDS)
    assert overlap(box, BOUNDS) == pytest.approx(90 * 12)


def test_the_first_label_gets_the_nearest_place():
    anchor = (400.0, 250.0)
    first, second = place_labels([anchor] * 2, [(50.0, 10.0)] * 2, [], BOUNDS)
    assert math.dist(nearest_point(first, anchor), anchor) <= math.dist(
        nearest_point(second, anchor), anchor
    )
    assert overlap(first, second) == 0
