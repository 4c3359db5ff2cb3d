"""Find the points that no other beats. In every coordinate, less is better."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Indices = NDArray[np.int64]


def no_worse(points: Points) -> NDArray[np.bool_]:
    """Compare points `[count, coordinates]` pairwise.

    Returns:
        `[count, count]`: at `[i, j]`, whether point i is no worse than point j in every coordinate.
    """
    result: NDArray[np.bool_] = np.all(points[:, None, :] <= points[None, :, :], axis=2)
    return result


def undominated(points: Points) -> Indices:
    """Return the points that no other beats: is no worse everywhere and better somewhere."""
    better = no_worse(points)
    return np.flatnonzero(~np.any(better & ~better.T, axis=0))


def unbeaten(points: Points, classes: Indices) -> Indices:
    """As `undominated`, but within classes, and of equal points only the first stays."""
    better = no_worse(points) & (classes[:, None] == classes[None, :])
    # At [i, j] with i before j: of two equal points the first beats the second.
    comes_first = np.triu(np.ones_like(better), 1)
    return np.flatnonzero(~np.any(better & (~better.T | comes_first), axis=0))
