"""Work of several threads at once."""

from __future__ import annotations

from threading import Barrier, get_ident

import pytest

from autoquant.models.threads import in_threads


def test_as_many_work_at_once_as_there_are_threads():
    together = Barrier(3)
    in_threads(lambda _: together.wait(timeout=10), range(6), 3)  # else a barrier breaks


def test_results_are_in_the_order_of_the_items():
    assert in_threads(lambda number: number * 2, iter(range(50)), 4) == list(range(0, 100, 2))
    assert in_threads(str, [], 4) == []


def test_one_thread_is_the_callers_own():
    assert set(in_threads(lambda _: get_ident(), range(3), 1)) == {get_ident()}


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_of_an_item_or_of_the_work_is_raised(threads):
    def items():
        yield from (3, 2, 1)
        raise LookupError("no more")

    with pytest.raises(ZeroDivisionError):
        in_threads(lambda number: 1 // number, [2, 1, 0, 1], threads)
    with pytest.raises(LookupError, match="no more"):
        in_threads(lambda number: 1 // number, items(), threads)
