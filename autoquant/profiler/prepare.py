"""Preparation off the clock: candidates compiled, tuned and tried out in parallel processes before any is timed.

What a process compiles lands in caches on disk, from which the timing process takes it in a moment. A candidate that fails,
computes something else or brings its process down is known before it could disturb a comparison. Candidates that a roofline
bound shows cannot win (see `autoquant.profiler.bounds`) are never compiled.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from autoquant.candidates import get_format
from autoquant.candidates.kernels.caches import tuning_folder, use_kernel_caches
from autoquant.candidates.registry import is_registered_here
from autoquant.errors import first_line
from autoquant.profiler.bounds import Tried, beaten, bounded
from autoquant.profiler.timing import try_out
from autoquant.records import Device, Measurement, Roofline, TimingSubject

_MOST_PROCESSES = 16
_BYTES_PER_WEIGHT = 20
_CONTEXT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _Answer:
    """What trying one candidate out gave."""

    measurement: Measurement
    stored_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """What preparation found.

    Attributes:
        decided: Outcomes that need no timing.
        tried: How many candidates were tried out.
        work_s: Seconds of work, summed over processes.
    """

    decided: Mapping[TimingSubject, Measurement]
    tried: int
    work_s: float


def prepare(
    subjects: Sequence[TimingSubject],
    *,
    device: Device,
    device_name: str,
    roofline: Callable[[], Roofline],
    on_progress: Callable[[int, str], None],
) -> Prepared:
    """Try out what can be: library kernels first, then compiled ones that could still win; tune those that are not far behind.

    Args:
        roofline: Gives the device's limits; called while the processes start, which do not use the device yet.
        on_progress: Told how many are done and what came last.

    Returns:
        The outcomes unsupported, bounded, beaten, failed and incorrect. What is left is ready to be timed.
    """
    decided, waiting = {}, []
    for subject in subjects:
        if reason := _unsupported_reason(subject, device.type):
            decided[subject] = Measurement(subject=subject, outcome="unsupported", reason=reason)
        elif not is_registered_here(subject.format):  # another process would not know it
            waiting.append(subject)
    library = [subject for subject in waiting if _kernel(subject).opaque]
    with _workers(device, device_name) as workers:
        workers.start(waiting)
        campaign = _Campaign(decided, roofline(), on_progress)
        campaign.take(workers.run(library, tune=False), tuned=False)
        compiled = [subject for subject in waiting if not _kernel(subject).opaque]
        campaign.take(workers.run(campaign.that_could_win(compiled), tune=False), tuned=False)
        campaign.take(workers.run(campaign.worth_tuning(library), tune=True), tuned=True)
    campaign.drop_the_beaten()
    return Prepared(campaign.decided, len(campaign.seen), campaign.work_s)


_kept: ContextVar[dict[str, _Workers] | None] = ContextVar("kept", default=None)


@contextmanager
def workers_kept() -> Iterator[None]:
    """Within it the processes that one call of `prepare` started wait for the next."""
    kept: dict[str, _Workers] = {}
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
        for workers in kept.values():
            workers.end()


@contextmanager
def _workers(device: Device, device_name: str) -> Iterator[_Workers]:
    kept = _kept.get()
    workers = kept.pop(device_name, None) if kept is not None else None
    workers = workers or _Workers(device, device_name)
    try:
        yield workers
    except BaseException:
        workers.end()  # some are at work that nobody waits for
        raise
    if kept is None:
        workers.end()
    else:
        workers.rest()
        kept[device_name] = workers


class _Campaign:
    """What is known so far."""

    def __init__(
        self,
        decided: dict[TimingSubject, Measurement],
        roofline: Roofline,
        on_progress: Callable[[int, str], None],
    ) -> None:
        self._roofline, self._on_progress = roofline, on_progress
        self._tried: dict[TimingSubject, Tried] = {}
        self._unsettled: list[TimingSubject] = []
        self.decided = decided
        self.seen: set[TimingSubject] = set()
        self.work_s = 0.0

    def decide(self, measurement: Measurement) -> None:
        self.decided[measurement.subject] = measurement
        self._tried.pop(measurement.subject, None)

    def take(self, answers: Iterator[_Answer], *, tuned: bool) -> None:
        """Take in what workers found, before or after tuning."""
        for answer in answers:
            subject = answer.measurement.subject
            self.seen.add(subject)
            self.work_s += answer.seconds
            self._on_progress(len(self.seen), subject.candidate)
            if answer.measurement.outcome == "ok":
                self._tried[subject] = Tried(min(answer.measurement.samples_us), answer.stored_bytes)
            elif _kernel(subject).tuned and not tuned:
                self._unsettled.append(subject)  # another setting may do
            else:
                self.decide(answer.measurement)

    def that_could_win(self, subjects: Sequence[TimingSubject]) -> list[TimingSubject]:
        """Those that the roofline leaves a chance."""
        cut = bounded(subjects, self._tried, self._roofline)
        self.decided |= cut
        return [subject for subject in subjects if subject not in cut]

    def worth_tuning(self, subjects: Sequence[TimingSubject]) -> list[TimingSubject]:
        """Those that a library tunes and that are not far behind as they are."""
        tunable = [subject for subject in subjects if subject in self._tried and _kernel(subject).tuned]
        hopeless = beaten(tunable, self._tried, "before it was tuned")
        for measurement in hopeless.values():
            self.decide(measurement)
        return [*(subject for subject in tunable if subject not in hopeless), *self._unsettled]

    def drop_the_beaten(self) -> None:
        """Decide on all that were far behind in the end."""
        self.decided |= beaten(list(self._tried), self._tried)


def _kernel(subject: TimingSubject) -> Any:
    return get_format(subject.format).kernel(subject.kernel)


def _unsupported_reason(subject: TimingSubject, device_type: str) -> str | None:
    fmt = get_format(subject.format)
    return fmt.unsupported_reason(fmt.kernel(subject.kernel), subject.shape, subject.m, device_type)


class _Workers:
    """Processes that try candidates out, one at a time each; one that dies is replaced, and what it was at has failed."""

    def __init__(self, device: Device, device_name: str) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._device_name = device_name
        self._arguments = (device_name, str(tuning_folder(device)), device.versions.get("compiler") != "none")
        self._processes: dict[Connection, BaseProcess] = {}

    def end(self) -> None:
        """End all processes, at the same time."""
        for connection in self._processes:
            connection.close()
        for connection in list(self._processes):
            self._end(connection)

    def rest(self) -> None:
        """Have the processes, none of which is at work, give back the device's memory."""
        self._bury()
        for connection in self._processes:
            connection.send(None)

    def start(self, subjects: Sequence[TimingSubject]) -> None:
        """Have processes ready for this work: as many as there are cores and memory for."""
        self._bury()
        most = min(_MOST_PROCESSES, max(1, (os.cpu_count() or 2) - 1), len(subjects), self._fitting(subjects))
        while len(self._processes) < most:
            self._begin()

    def run(self, subjects: Sequence[TimingSubject], *, tune: bool) -> Iterator[_Answer]:
        """Give the subjects to the processes in turn; answers come as they are ready.

        Args:
            tune: Let libraries tune their kernels; otherwise they run as they are.
        """
        waiting = list(reversed(_by_shape(subjects)))
        at_work: dict[Connection, TimingSubject] = {}
        self.start(waiting)
        idle = list(self._processes)
        while waiting or at_work:
            while waiting and idle:
                connection = idle.pop()
                at_work[connection] = waiting.pop()
                connection.send((at_work[connection], tune))
            for ready in wait(list(at_work)):
                assert isinstance(ready, Connection)
                subject = at_work.pop(ready)
                try:
                    answer: _Answer = ready.recv()
                    idle.append(ready)
                except (EOFError, OSError):
                    answer = _Answer(_died(subject, self._end(ready)))
                    idle.append(self._begin())
                yield answer

    def _fitting(self, subjects: Sequence[TimingSubject]) -> int:
        """How many processes there is memory for: each holds a weight in several forms."""
        import torch

        if torch.device(self._device_name).type != "cuda" or not subjects:
            return len(subjects)
        largest = max(_BYTES_PER_WEIGHT * subject.shape.n * subject.shape.k for subject in subjects)
        free, _ = torch.cuda.mem_get_info(self._device_name)
        started = len(self._processes)
        return max(1, started + int((free - started * largest) // (largest + _CONTEXT_BYTES)))

    def _begin(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def _bury(self) -> None:
        """Forget processes that died at rest."""
        for connection, process in list(self._processes.items()):
            if not process.is_alive():
                self._end(connection)

    def _end(self, connection: Connection) -> int | None:
        """End a process; returns how it exited."""
        process = self._processes.pop(connection)
        connection.close()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode


def _by_shape(subjects: Sequence[TimingSubject]) -> list[TimingSubject]:
    """The longest to prepare first: those of many rows, then large weights."""
    return sorted(subjects, key=lambda s: (-s.m, -s.shape.n * s.shape.k))


def _died(subject: TimingSubject, exit_code: int | None) -> Measurement:
    how = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    return Measurement(subject=subject, outcome="failed", reason=f"brought its process down ({how})")


def _work(connection: Connection, device_name: str, tuning: str, compiled: bool) -> None:
    """The life of a worker: try out what comes until the other side is gone."""
    import signal
    import warnings

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process when it is interrupted
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say here has no reader; outcomes carry their reasons
    use_kernel_caches()
    import torch
    import torch._inductor.config as inductor_config

    from autoquant.candidates.kernels import gemlite
    from autoquant.profiler.timing import Problem

    torch.set_num_threads(1)
    inductor_config.compile_threads = 1
    gemlite.load_tuning(tuning)
    gemlite.tune_briefly()
    problem: Problem | None = None
    while True:
        try:
            work = connection.recv()
        except EOFError:
            break
        if work is None:
            problem = None
            if torch.device(device_name).type == "cuda":
                torch.cuda.empty_cache()
            continue
        subject, tune = work
        started = time.monotonic()
        fmt = get_format(subject.format)
        try:
            if problem is None or (problem.shape, problem.m) != (subject.shape, subject.m):
                problem = None  # frees its memory first
                problem = Problem(subject.shape, subject.m, device_name)
            with nullcontext() if tune else gemlite.untuned():
                measurement, stored = try_out(subject, fmt, fmt.kernel(subject.kernel), problem, compiled=compiled)
        except Exception as error:  # noqa: BLE001 - out of memory, say: an outcome with its reason
            measurement, stored = (
                Measurement(subject=subject, outcome="failed", reason=first_line(error, with_type=True)),
                0,
            )
        if tune:
            gemlite.save_tuning(tuning)
        connection.send(_Answer(measurement, stored, time.monotonic() - started))
        if measurement.outcome == "failed" and not _is_sound(device_name):
            os._exit(1)  # the context is lost: a new process goes on


def _is_sound(device_name: str) -> bool:
    from autoquant.devices.device import synchronize

    try:
        synchronize(device_name)
    except RuntimeError:
        return False
    return True
