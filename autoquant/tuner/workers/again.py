"""Run a job once more if its process died.

A kernel that ends its process does so again. What ended it from outside, a user or a lack of
memory, says nothing about the job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from autoquant.errors import HungError, ProcessDiedError
from autoquant.events import Listener, Notice
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import Job

Result = TypeVar("Result")


def run_again(
    runner: Runner, job: Job[Result], on_message: Callable[[Any], None], listener: Listener
) -> Result:
    """Return the result of a job, from its second run if the first one died.

    Raises:
        ProcessDiedError: It died both times, or did not end.
    """
    try:
        return runner.run(job, on_message)
    except HungError:
        raise  # it would hang as long again
    except ProcessDiedError as death:
        listener(Notice(f"tried once more: {death}"))
        return runner.run(job, on_message)
