"""Run a job once more if its process died.

A kernel that ends its process does so again. What ended it from outside, a user or a lack of
memory, says nothing about the job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from autoquant.errors import HungError, ProcessDiedError, WorkerLostError
from autoquant.events import Listener, Notice
from autoquant.tuner.workers.crew import MOST_LOST, Begun, begin
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import Job

Result = TypeVar("Result")


def run_again(
    runner: Runner,
    job: Job[Result],
    on_message: Callable[[Any], None],
    listener: Listener,
    begun: Begun[Result] | None = None,
) -> Result:
    """Return the result of a job, from a further run if a worker was lost or it died once.

    Args:
        begun: The job, if it was begun before.

    Raises:
        ProcessDiedError: It died twice, did not end, or lost five workers.
    """
    died = lost = 0
    while True:
        try:
            return (begun or begin(runner, job, on_message, first=True)).result()
        except HungError:
            raise  # it would hang as long again
        except ProcessDiedError as death:
            died += not isinstance(death, WorkerLostError)
            lost += isinstance(death, WorkerLostError)
            if died > 1 or lost >= MOST_LOST:
                raise
            begun = None
            listener(Notice(f"tried once more: {death}"))
