"""What holds for all tests: those that need a GPU are left out where there is none, and collecting garbage is quick."""

from __future__ import annotations

import gc

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(absent)


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """Leave out what is there already: a search collects dozens of times, each of which takes half a second otherwise."""
    gc.collect()
    gc.freeze()
