"""Runners of jobs, and the one that runs them in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from autoquant.tuner.workers.jobs import Bench, Job

Result = TypeVar("Result")


class Runner(Protocol):
    """Runs jobs one at a time."""

    def run(self, job: Job[Result], on_message: Callable[[Any], None]) -> Result:
        """Return the job's result. Its messages go to `on_message`; its exceptions are raised."""
        ...

    def close(self) -> None: ...


class InProcessRunner:
    """Runs jobs in this process."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def run(self, job: Job[Result], on_message: Callable[[Any], None]) -> Result:
        return job.run(self._bench, on_message)

    def close(self) -> None:
        """Free what jobs keep in memory for the next one."""
        del self._bench
