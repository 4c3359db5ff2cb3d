"""The time of a search, over all its runs."""

import pytest
from builders.records import STUDY

from autoquant.study.study import Study
from autoquant.tuner.budget import Budget


@pytest.fixture
def clock():
    return [100.0]


@pytest.fixture
def budget(store, clock):
    def start(limit_s=60.0):
        spent_s = store.study(STUDY).spent_s
        return Budget(
            store=store,
            study_id=STUDY,
            limit_s=limit_s,
            started_s=clock[0],
            spent_before_s=spent_s,
            now_s=lambda: clock[0],
        )

    return start


def test_time_of_earlier_runs_counts(budget, clock, store):
    first = budget()
    clock[0] += 25
    assert (first.spent_s(), first.left_s()) == (25, 35)
    first.note()
    clock[0] += 1000  # not running
    second = budget()
    clock[0] += 5
    assert second.left_s() == 30
    second.note()
    assert store.study(STUDY).spent_s == 30 and not store.study(STUDY).complete


def test_a_search_that_ended_early_has_had_its_whole_budget(budget, clock, store):
    run = budget()
    clock[0] += 5
    assert not run.is_filled()
    run.finish()
    assert store.study(STUDY).complete and store.study(STUDY).spent_s == 60
    assert budget(60).is_filled() and not budget(61).is_filled()


def test_a_search_that_took_longer_keeps_what_it_took(budget, clock, store):
    run = budget()
    clock[0] += 90
    run.finish()
    assert store.study(STUDY).spent_s == 90


def test_a_search_that_was_cut_off_is_not_complete_however_long_it_took(budget, clock):
    run = budget()
    clock[0] += 90
    run.note()
    assert not budget().is_filled()


def test_a_run_begins_with_what_the_store_says(store):
    store.update_study(STUDY, spent_s=12.5)
    assert Budget.of(store, STUDY, 60.0, 0.0).spent_before_s == 12.5


def test_stages_keep_what_they_took_over_all_runs(budget, clock, store):
    for seconds in (3, 4):
        run = budget()
        with run.stage("score"):
            clock[0] += seconds
        run.add("load", 0.5)
    assert Study(store, STUDY).stage_seconds() == {"score": 7, "load": 1.0}
    assert store.study(STUDY).spent_s == 7


def test_a_stage_that_is_interrupted_keeps_what_it_took(budget, clock, store):
    run = budget()
    with pytest.raises(KeyboardInterrupt), run.stage("prove"):
        clock[0] += 5
        raise KeyboardInterrupt
    assert Study(store, STUDY).stage_seconds() == {"prove": 5}
    assert store.study(STUDY).spent_s == 5


class Memory:
    """Stands in for what looks at memory."""

    def __init__(self, *taken):
        self._taken = list(taken)

    def take(self):
        return self._taken.pop(0)


def test_stages_keep_the_most_memory_of_all_runs(store):
    memory = Memory({"host": 5, "device": 70}, {"host": 9, "device": 60}, {}, {"host": 4})
    run = Budget.of(store, STUDY, 60.0, 0.0, memory)
    for stage in ("score", "score", "score", "prove"):
        run.add(stage, 1)
    known = {"score": {"host": 9, "device": 70}, "prove": {"host": 4}}
    assert Study(store, STUDY).stage_memory() == known


def test_a_study_of_an_older_version_knows_no_memory(store):
    store.put_reference(STUDY, "stages", {"seconds": {"score": 1.0}})
    assert Study(store, STUDY).stage_memory() == {}
    assert Study(store, STUDY).stage_seconds() == {"score": 1.0}
