"""Say what a search will take, once it is known what there is to do."""

from __future__ import annotations

from autoquant.events import Ending, Notice
from autoquant.records import Recording
from autoquant.tuner.budget import Budget
from autoquant.tuner.expected import Expected, expect, keep_work, work_of
from autoquant.tuner.setup import SearchSetup
from autoquant.tuner.stages.profile import subjects_to_time


def announce(setup: SearchSetup, recording: Recording, budget: Budget) -> Expected:
    """Say how long each part is expected to take, and whether the time budget has room for it."""
    settled, store = setup.settled, setup.store
    subjects, _ = subjects_to_time(setup, recording)
    work = work_of(settled, store, recording, subjects)
    expected = expect(settled, store, work)
    keep_work(store, settled.study_id, work)
    least_s, left_s, limit_s = expected.least_s, budget.left_s(), budget.limit_s
    if least_s > left_s:
        text = (
            f"the time budget of {limit_s:.0f} s is too short for the least that a search does,"
            f" which takes {budget.spent_s() + least_s:.0f} s ({expected.words()}): it is done all"
            " the same"
        )
    else:
        text = (
            f"expected to take {expected.words()}; that leaves {left_s - least_s:.0f} of"
            f" {limit_s:.0f} s for further plans"
        )
    setup.listener(Notice(text))
    setup.listener(Ending(max(least_s, left_s)))
    return expected
