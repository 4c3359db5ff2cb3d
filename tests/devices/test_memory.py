"""Collecting garbage while a search runs."""

from __future__ import annotations

import gc

import pytest

from autoquant.devices.memory import leave_out_of_collections, quick_collections


@pytest.fixture(autouse=True)
def nothing_frozen():
    """Begin as a program does, and end as the other tests expect it."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    if frozen:
        gc.freeze()


class Cycle:
    def __init__(self):
        self.itself = self


def test_what_exists_is_left_out_and_counted_again_afterwards():
    with quick_collections():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_garbage_that_is_made_inside_is_collected():
    with quick_collections():
        gc.disable()
        try:
            Cycle()
            assert gc.collect() >= 1
        finally:
            gc.enable()


def test_what_somebody_else_froze_stays_frozen():
    gc.freeze()
    with quick_collections():
        pass
    assert gc.get_freeze_count() > 0


def test_it_ends_with_an_error_too():
    with pytest.raises(KeyError), quick_collections():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_was_made_since_is_left_out_where_something_is_already():
    leave_out_of_collections()
    assert gc.get_freeze_count() == 0, "nobody would undo it"
    with quick_collections():
        before = gc.get_freeze_count()
        kept = [[] for _ in range(1000)]
        leave_out_of_collections()
        assert gc.get_freeze_count() >= before + len(kept)
    assert gc.get_freeze_count() == 0
