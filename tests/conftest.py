"""What holds for all tests: which are run, in which order, and how garbage is collected."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Small kernels are slow where threads of several processes wait for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent

LONGEST_FIRST = (
    "end_to_end",
    "docs",
    "export",
    "profiler",
    "runtime",
    "evaluators",
    "tuner",
    "solver",
    "cli",
)
"""Folders. Files are handed to workers whole, so that one that takes long must not be the last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {folder: number for number, folder in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(HERE).parts[0], len(order)))
    of_gpus = [item for item in items if item.get_closest_marker("gpu")]
    if of_gpus and not _has_gpu():
        absent = pytest.mark.skip(reason="no CUDA device here")
        for item in of_gpus:
            item.add_marker(absent)


def _has_gpu() -> bool:
    import torch  # seconds, in each process of a run: only where it is needed

    return torch.cuda.is_available()


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """Leave out what is there already: a search collects dozens of times, each of which takes half a second otherwise."""
    gc.collect()
    gc.freeze()
