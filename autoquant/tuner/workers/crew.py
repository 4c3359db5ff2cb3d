"""Jobs begun before their results are needed, and workers that share them.

A stage begins jobs on whatever runner it has. A plain one runs each when its result is asked for.
A `Crew` has several, each in a thread, which take the jobs in turn. Messages and results are handed
out in the thread that waits, so only that one writes to the store.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

from autoquant.errors import WorkerLostError, WorkersError, first_line
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import Job

MOST_LOST = 5
"""A job, or a start, is given to so many workers that are lost, and to no further one."""
Result = TypeVar("Result")
OnMessage = Callable[[Any], None]


class Begun(Generic[Result]):
    """A job whose result comes later.

    Attributes:
        seconds: What it took, once it is done.
    """

    def __init__(
        self, job: Job[Result], on_message: OnMessage, advance: Callable[[Begun[Any]], None]
    ) -> None:
        self.job, self.on_message = job, on_message
        self.seconds = 0.0
        self._advance = advance
        self._value: Result | None = None
        self._error: BaseException | None = None
        self.is_done = False

    def result(self) -> Result:
        """Return the job's result, or raise what it raised, once it is done."""
        while not self.is_done:
            self.wait()
        if self._error is not None:
            raise self._error
        return cast(Result, self._value)

    def wait(self) -> None:
        """Wait until something happens, to this job or to another one that was begun."""
        self._advance(self)

    def do(self, runner: Runner, on_message: OnMessage) -> None:
        """Run the job, and keep how that ended; `end` makes it known."""
        started_s = time.monotonic()
        try:
            self._value = runner.run(self.job, on_message)
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            self._error = error
        self.seconds = time.monotonic() - started_s

    @property
    def lost_its_worker(self) -> bool:
        """The worker that ran it is gone."""
        return isinstance(self._error, WorkerLostError)

    def end(self) -> None:
        """Make known that it is done."""
        self.is_done = True


class Crew:
    """Several runners as one. Each is in a thread, and takes the next job when it has none."""

    def __init__(self) -> None:
        self._runners: list[Runner] = []
        self._waiting: deque[Begun[Any]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._joining = 0
        self._failed: BaseException | None = None
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()

    @property
    def workers(self) -> int:
        """The number of runners, with those that are being made."""
        return len(self._runners) + self._joining

    def join(self, make: Callable[[], Runner]) -> None:
        """Take one more runner in. It is made in its thread: processes end with the one's."""
        self._joining += 1
        threading.Thread(target=self._work, args=(make,), daemon=True).start()

    def wait_for_all(self) -> None:
        """Wait until all runners are made.

        Raises what making the first of them raised that could not be made, once all are closed.
        """
        try:
            with self._changed:
                while self._joining:
                    self._changed.wait()
        except BaseException:
            self.close()
            raise
        if self._failed is not None:
            self.close()
            raise self._failed

    def run(self, job: Job[Result], on_message: OnMessage) -> Result:
        """Run a job as `Runner.run`, before those that wait."""
        return self.begin(job, on_message, first=True).result()

    def begin(
        self, job: Job[Result], on_message: OnMessage, *, first: bool = False
    ) -> Begun[Result]:
        """Have the next free runner run a job.

        Args:
            first: Before those that wait already.
        """
        begun = Begun(job, on_message, lambda _begun: self._pass_on())
        with self._changed:
            (self._waiting.appendleft if first else self._waiting.append)(begun)
            self._changed.notify()
        return begun

    def drop(self, begun: Begun[Any]) -> None:
        """Do not run a job that still waits. One that runs goes on, and nobody is told."""
        begun.on_message = lambda _message: None
        with self._changed, suppress(ValueError):
            self._waiting.remove(begun)

    def close(self) -> None:
        """End all runners, whatever they are at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for runner in self._runners:
            runner.close()

    def _pass_on(self) -> None:
        """Hand out the next message or result, of any job."""
        self._events.get()()

    def _work(self, make: Callable[[], Runner]) -> None:
        runner = self._made(make)
        while runner is not None and (begun := self._next()) is not None:
            begun.do(runner, self._teller(begun))
            self._events.put(begun.end)
            if begun.lost_its_worker:
                runner = self._made_again(make, runner)
            del begun

    def _made(self, make: Callable[[], Runner]) -> Runner | None:
        """Make a runner and take it in; return None if that fails, or all are closed by now."""
        runner = failed = None
        for _ in range(MOST_LOST):  # it may be lost while it starts
            try:
                runner, failed = make(), None
            except BaseException as error:  # noqa: BLE001 - raised by `wait_for_all`
                failed = error
            if not isinstance(failed, WorkerLostError) or self._closed:
                break
        with self._changed:
            self._joining -= 1
            self._failed = self._failed or failed
            if runner is not None:
                self._runners.append(runner)
            self._changed.notify_all()
            if not (self._closed or self._runners or self._joining):
                self._events.put(self._raise_gone)
            if not self._closed:
                return runner
        if runner is not None:
            runner.close()
        return None

    def _raise_gone(self) -> None:
        assert self._failed is not None
        raise WorkersError(f"no worker is left: {first_line(self._failed)}") from self._failed

    def _made_again(self, make: Callable[[], Runner], lost: Runner) -> Runner | None:
        """Replace a runner whose worker is gone. Jobs go to the others while that takes."""
        lost.close()
        with self._changed:
            if self._closed:
                return None
            self._runners.remove(lost)
            self._joining += 1
        return self._made(make)

    def _teller(self, begun: Begun[Any]) -> OnMessage:
        return lambda message: self._events.put(lambda: begun.on_message(message))

    def _next(self) -> Begun[Any] | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return None if self._closed else self._waiting.popleft()


def count(runner: Runner) -> int:
    """Return how many jobs a runner runs at a time."""
    return runner.workers if isinstance(runner, Crew) else 1


def begin(
    runner: Runner, job: Job[Result], on_message: OnMessage, *, first: bool = False
) -> Begun[Result]:
    """Begin a job, see `Crew.begin`. A runner of one job at a time runs it in `Begun.result`."""
    if isinstance(runner, Crew):
        return runner.begin(job, on_message, first=first)

    def run(begun: Begun[Any]) -> None:
        begun.do(runner, on_message)
        begun.end()

    return Begun(job, on_message, run)


def drop(runner: Runner, begun: Begun[Any]) -> None:
    """Drop a job that was begun, and whose result nobody wants any more."""
    if isinstance(runner, Crew):
        runner.drop(begun)


def next_done(begun: Sequence[Begun[Any]]) -> Begun[Any]:
    """Return the first of the jobs that is done, once one is."""
    while True:
        for each in begun:
            if each.is_done:
                return each
        begun[0].wait()
