"""Places for labels in a picture, in pixels, so that they cover neither points nor each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

_DISTANCES = (9.0, 16.0, 26.0, 40.0, 58.0, 80.0, 106.0, 136.0, 170.0)
_DIRECTIONS_DEGREES = (30, 150, 330, 210, 0, 180, 90, 270, 60, 120, 300, 240)
_MARGIN = 2.0


def place_labels(
    anchors: Sequence[Point], sizes: Sequence[Point], obstacles: Sequence[Box], bounds: Box
) -> list[Box]:
    """Return boxes for labels of `sizes` near their `anchors`. The first label chooses first.

    Args:
        obstacles: Boxes that should stay free.
        bounds: The box that labels should stay in.
    """
    taken = list(obstacles)
    placed: list[Box] = []
    for anchor, size in zip(anchors, sizes, strict=True):
        best = min(_places(anchor, size), key=lambda place: _cost(place, anchor, taken, bounds))
        placed.append(best)
        left, bottom, right, top = best
        taken.append((left - _MARGIN, bottom - _MARGIN, right + _MARGIN, top + _MARGIN))
    return placed


def nearest_point(box: Box, anchor: Point) -> Point:
    """Return the point of `box` nearest to `anchor`."""
    left, bottom, right, top = box
    x, y = anchor
    return min(max(x, left), right), min(max(y, bottom), top)


def overlap(a: Box, b: Box) -> float:
    """Return the area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _places(anchor: Point, size: Point) -> list[Box]:
    """Return boxes around the anchor. The text begins or ends on the anchor's side."""
    return [
        _place(anchor, size, distance, degrees)
        for distance in _DISTANCES
        for degrees in _DIRECTIONS_DEGREES
    ]


def _place(anchor: Point, size: Point, distance: float, degrees: int) -> Box:
    width, height = size
    across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    left = anchor[0] + distance * across
    if degrees in (90, 270):
        left -= width / 2
    elif across < 0:
        left -= width
    bottom = anchor[1] + distance * up - height / 2
    return left, bottom, left + width, bottom + height


def _cost(place: Box, anchor: Point, taken: Sequence[Box], bounds: Box) -> float:
    covered = sum(overlap(place, box) for box in taken)
    area = (place[2] - place[0]) * (place[3] - place[1])
    outside = area - overlap(place, bounds)
    return 10 * covered + 20 * outside + math.dist(nearest_point(place, anchor), anchor)
