"""Candidates compiled, tuned and tried out in parallel processes before any is timed.

A process compiles into caches on disk, which the timing process reads in a moment. Candidates that
fail, are incorrect or crash their process are known before they could disturb a comparison.
Candidates that cannot win by the roofline (see `autoquant.profiler.bounds`) are never compiled.
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
from pathlib import Path

from autoquant.candidates import Kernel, get_format
from autoquant.candidates.kernels.caches import (
    load_tuning,
    save_tuning,
    tune_briefly,
    tuning_folder,
    untuned,
    use_kernel_caches,
)
from autoquant.candidates.registry import is_registered_here
from autoquant.devices import backend
from autoquant.devices.effort import TimingEffort, timing_effort, use_timing_effort
from autoquant.errors import first_line
from autoquant.files import raise_if_full
from autoquant.processes import die_with
from autoquant.profiler.bounds import Tried, beaten, bounded
from autoquant.profiler.timing import LinearToTime, try_out
from autoquant.records import Device, Measurement, Roofline, TimingSubject

_MOST_PROCESSES = 16
_BYTES_PER_WEIGHT = 20
_CONTEXT_BYTES = 1 << 30
_LONGER_TO_TUNE = 5
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class _Answer:
    """The result of trying one candidate out."""

    measurement: Measurement
    stored_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """The result of preparation.

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
    """Try candidates out: kernels of libraries first, then compiled ones that could still win.

    Kernels that a library tunes are tuned if they are not far behind without.

    Args:
        roofline: Returns the device's limits. It is called while the processes start, which do not
            use the device yet.
        on_progress: Takes how many are done, and the last candidate.

    Returns:
        The outcomes unsupported, bounded, beaten, failed and incorrect. All others are ready to be
        timed.
    """
    decided, waiting = {}, []
    for subject in subjects:
        if reason := _unsupported_reason(subject, device.type):
            decided[subject] = Measurement(subject=subject, outcome="unsupported", reason=reason)
        elif not is_registered_here(subject.format):  # another process would not know it
            waiting.append(subject)
    # Kernels of libraries need no compilation. What they take shows which others cannot win.
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
    """Inside, the processes that one call of `prepare` started wait for the next."""
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
        workers.end()  # some are still at work
        raise
    if kept is None:
        workers.end()
    else:
        workers.rest()
        kept[device_name] = workers


class _Campaign:
    """Collects outcomes, and decides which candidates are worth more work."""

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
        """Take in the answers of workers, from before or after tuning."""
        for answer in answers:
            subject = answer.measurement.subject
            self.seen.add(subject)
            self.work_s += answer.seconds
            self._on_progress(len(self.seen), subject.candidate)
            if answer.measurement.outcome == "ok":
                self._tried[subject] = Tried(
                    min(answer.measurement.samples_us), answer.stored_bytes
                )
            elif _kernel(subject).tuned and not tuned:
                self._unsettled.append(subject)  # another setting may do
            else:
                self.decide(answer.measurement)

    def that_could_win(self, subjects: Sequence[TimingSubject]) -> list[TimingSubject]:
        """Return those that could win by the roofline, and decide on the others."""
        cut = bounded(subjects, self._tried, self._roofline)
        self.decided |= cut
        return [subject for subject in subjects if subject not in cut]

    def worth_tuning(self, subjects: Sequence[TimingSubject]) -> list[TimingSubject]:
        """Return those that a library tunes, and decide on those far behind without."""
        tunable = [
            subject for subject in subjects if subject in self._tried and _kernel(subject).tuned
        ]
        hopeless = beaten(tunable, self._tried, "before it was tuned")
        for measurement in hopeless.values():
            self.decide(measurement)
        return [*(subject for subject in tunable if subject not in hopeless), *self._unsettled]

    def drop_the_beaten(self) -> None:
        """Decide on all that were far behind in the end."""
        self.decided |= beaten(list(self._tried), self._tried)


def _kernel(subject: TimingSubject) -> Kernel:
    return get_format(subject.format).kernel(subject.kernel)


def _unsupported_reason(subject: TimingSubject, device_type: str) -> str | None:
    fmt = get_format(subject.format)
    return fmt.unsupported_reason(fmt.kernel(subject.kernel), subject.shape, subject.m, device_type)


class _Workers:
    """A pool of processes that try candidates out.

    A process that dies is replaced, and its candidate has failed.
    """

    def __init__(self, device: Device, device_name: str) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._device_name = device_name
        compiled = device.versions.get("compiler") != "none"
        self._arguments = (device_name, tuning_folder(device), compiled, timing_effort())
        self._processes: dict[Connection, BaseProcess] = {}

    def end(self) -> None:
        """End all processes, at the same time."""
        for connection in self._processes:
            connection.close()
        for connection in list(self._processes):
            self._end(connection)

    def rest(self) -> None:
        """Have the processes, which must be idle, return the device's memory."""
        self._reap()
        for connection in self._processes:
            connection.send(None)

    def start(self, subjects: Sequence[TimingSubject]) -> None:
        """Start processes for this work, as many as cores and memory allow."""
        self._reap()
        most = min(
            _MOST_PROCESSES,
            max(1, (os.cpu_count() or 2) - 1),
            len(subjects),
            self._fitting(subjects),
        )
        while len(self._processes) < most:
            self._begin()

    def run(self, subjects: Sequence[TimingSubject], *, tune: bool) -> Iterator[_Answer]:
        """Give the subjects to the processes; yield answers as they come.

        Args:
            tune: Let libraries tune their kernels.
        """
        waiting = list(reversed(_by_shape(subjects)))
        at_work: dict[Connection, TimingSubject] = {}
        died: set[TimingSubject] = set()
        ends_s: dict[Connection, float] = {}
        limit_s = timing_effort().candidate_limit_s * (_LONGER_TO_TUNE if tune else 1)
        self.start(waiting)
        idle = list(self._processes)
        while waiting or at_work:
            while waiting and idle:
                connection = idle.pop()
                at_work[connection] = waiting.pop()
                ends_s[connection] = time.monotonic() + limit_s
                connection.send((at_work[connection], tune))
            for hung in [each for each in at_work if time.monotonic() > ends_s[each]]:
                subject = at_work.pop(hung)
                self._processes[hung].kill()
                self._end(hung)
                idle.append(self._begin())
                yield _Answer(_failed(subject, f"did not end within {limit_s:.0f} s"))
            for ready in wait(list(at_work), _LOOK_S):
                assert isinstance(ready, Connection)
                subject = at_work.pop(ready)
                try:
                    answer: _Answer = ready.recv()
                    idle.append(ready)
                except (EOFError, OSError):
                    exit_code = self._end(ready)
                    idle.append(self._begin())
                    if subject not in died:  # it may have been killed from outside
                        died.add(subject)
                        waiting.append(subject)
                        continue
                    answer = _Answer(_died(subject, exit_code))
                yield answer

    def _fitting(self, subjects: Sequence[TimingSubject]) -> int:
        """Return how many processes, each with a weight in several forms, fit into memory."""
        free_bytes = backend(self._device_name).free_bytes()
        if free_bytes is None or not subjects:
            return len(subjects)
        largest = max(_BYTES_PER_WEIGHT * subject.shape.n * subject.shape.k for subject in subjects)
        started = len(self._processes)
        return max(1, started + int((free_bytes - started * largest) // (largest + _CONTEXT_BYTES)))

    def _begin(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def _reap(self) -> None:
        """Drop idle processes that have exited."""
        for connection, process in list(self._processes.items()):
            if not process.is_alive():
                self._end(connection)

    def _end(self, connection: Connection) -> int | None:
        """End a process; return its exit code."""
        process = self._processes.pop(connection)
        connection.close()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode


def _by_shape(subjects: Sequence[TimingSubject]) -> list[TimingSubject]:
    """Return the longest to prepare first: those of many rows, then large weights."""
    return sorted(subjects, key=lambda s: (-s.m, -s.shape.n * s.shape.k))


def _died(subject: TimingSubject, exit_code: int | None) -> Measurement:
    how = f"exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        how = f"signal {-exit_code}"
    return _failed(subject, f"brought its process down ({how})")


def _failed(subject: TimingSubject, reason: str) -> Measurement:
    return Measurement(subject=subject, outcome="failed", reason=reason)


def _work(
    connection: Connection, device_name: str, tuning: Path, compiled: bool, effort: TimingEffort
) -> None:
    """Try candidates out until the other side is gone: all that a worker does."""
    import signal
    import warnings

    parent = multiprocessing.parent_process()
    die_with(parent.pid if parent else None)
    # The parent ends this process when it is interrupted.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # outcomes carry their reasons
    use_kernel_caches()
    import torch
    import torch._inductor.config as inductor_config

    torch.set_num_threads(1)
    inductor_config.compile_threads = 1
    use_timing_effort(effort)
    load_tuning(tuning)
    tune_briefly()
    linear: LinearToTime | None = None
    while True:
        try:
            work = connection.recv()
        except EOFError:
            break
        if work is None:
            linear = None
            backend(device_name).trim_memory()
            continue
        subject, tune = work
        started = time.monotonic()
        fmt = get_format(subject.format)
        try:
            if linear is None or (linear.shape, linear.m) != (subject.shape, subject.m):
                linear = None  # frees its memory first
                linear = LinearToTime(subject.shape, subject.m, device_name)
            with nullcontext() if tune else untuned():
                measurement, stored = try_out(
                    subject, fmt, fmt.kernel(subject.kernel), linear, compiled=compiled
                )
        except Exception as error:  # noqa: BLE001 - out of memory, say: an outcome with its reason
            raise_if_full(error)
            reason = first_line(error, with_type=True)
            measurement = Measurement(subject=subject, outcome="failed", reason=reason)
            stored = 0
        if tune:
            save_tuning(tuning)
        connection.send(_Answer(measurement, stored, time.monotonic() - started))
        if measurement.outcome == "failed" and not _is_sound(device_name):
            os._exit(1)  # the context is lost: a new process goes on


def _is_sound(device_name: str) -> bool:
    """Check that the device still computes: a kernel may have broken its context."""
    try:
        backend(device_name).synchronize()
    except RuntimeError:
        return False
    return True
