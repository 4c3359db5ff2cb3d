"""Preparation off the clock: candidates compiled, tuned and tried out in parallel processes before any is timed.

What a process compiles lands in caches on disk, from which the timing process takes it in a moment. A candidate that fails,
computes something else or brings its process down is known before it could disturb a comparison. Candidates that a roofline
bound shows cannot win (see `autoquant.profiler.bounds`) are never compiled.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from autoquant.candidates import get_format
from autoquant.candidates.registry import is_registered_here
from autoquant.profiler.bounds import Tried, beaten, bounded
from autoquant.profiler.caches import tuning_folder, use_kernel_caches
from autoquant.profiler.timing import first_line, try_out
from autoquant.records import Device, LinearShape, Measurement, Roofline, TimingSubject

_MOST_PROCESSES = 16
_BYTES_PER_WEIGHT = 20
_CONTEXT_BYTES = 1 << 30
_Answer = tuple[TimingSubject, Measurement, int]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What preparation found: outcomes that need no timing, and how many candidates were tried out."""

    decided: Mapping[TimingSubject, Measurement]
    tried: int


def prepare(
    subjects: Sequence[TimingSubject],
    *,
    device: Device,
    device_name: str,
    roofline: Roofline,
    on_progress: Callable[[int, str], None],
) -> Prepared:
    """Try out all that can be, first what needs no compiler, then of the rest what could still win against that.

    Args:
        on_progress: Told how many are done and what came last.

    Returns:
        The outcomes unsupported, bounded, beaten, failed and incorrect. What is left is ready to be timed.
    """
    decided: dict[TimingSubject, Measurement] = {}
    open_subjects = []
    for subject in subjects:
        if reason := _unsupported_reason(subject, device.type):
            decided[subject] = Measurement(subject=subject, outcome="unsupported", reason=reason)
        elif not is_registered_here(subject.format):  # another process would not know it
            open_subjects.append(subject)
    quick = [subject for subject in open_subjects if _kernel(subject).opaque]
    slow = [subject for subject in open_subjects if not _kernel(subject).opaque]
    tried: dict[TimingSubject, Tried] = {}
    done = 0
    with _Workers(device, device_name, _fitting(open_subjects, device_name)) as workers:
        for wave in (quick, slow):
            if wave is slow:
                cut = bounded(slow, tried, roofline)
                decided |= cut
                wave = [subject for subject in slow if subject not in cut]
            for subject, measurement, stored in workers.run(wave):
                done += 1
                on_progress(done, subject.candidate)
                if measurement.outcome == "ok":
                    tried[subject] = Tried(min(measurement.samples_us), stored)
                else:
                    decided[subject] = measurement
    return Prepared(decided | beaten(tried), done)


def _kernel(subject: TimingSubject) -> Any:
    return get_format(subject.format).kernel(subject.kernel)


def _unsupported_reason(subject: TimingSubject, device_type: str) -> str | None:
    fmt = get_format(subject.format)
    return fmt.unsupported_reason(fmt.kernel(subject.kernel), subject.shape, subject.m, device_type)


def _fitting(subjects: Sequence[TimingSubject], device_name: str) -> int:
    """How many processes there is work and memory for: each holds a weight in several forms."""
    import torch

    if torch.device(device_name).type != "cuda" or not subjects:
        return len(subjects)
    largest = max(_BYTES_PER_WEIGHT * subject.shape.n * subject.shape.k for subject in subjects)
    free, _ = torch.cuda.mem_get_info(device_name)
    return min(len(subjects), max(1, int(free // (largest + _CONTEXT_BYTES))))


class _Workers:
    """Processes that try candidates out, one at a time each; one that dies is replaced, and what it was at has failed."""

    def __init__(self, device: Device, device_name: str, most: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._arguments = (device_name, str(tuning_folder(device)), device.versions.get("compiler") != "none")
        self._count = min(_MOST_PROCESSES, max(1, (os.cpu_count() or 2) - 1), most)
        self._processes: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in list(self._processes):
            self._end(connection)

    def run(self, subjects: Sequence[TimingSubject]) -> Iterator[_Answer]:
        """Give the subjects to the processes in turn; answers come as they are ready."""
        waiting = list(reversed(_by_shape(subjects)))
        at_work: dict[Connection, TimingSubject] = {}
        while len(self._processes) < min(self._count, len(waiting)):
            self._begin()
        idle = list(self._processes)
        while waiting or at_work:
            while waiting and idle:
                connection = idle.pop()
                at_work[connection] = waiting.pop()
                connection.send(at_work[connection])
            for ready in wait(list(at_work)):
                assert isinstance(ready, Connection)
                subject = at_work.pop(ready)
                try:
                    answer: _Answer = (subject, *ready.recv())
                    idle.append(ready)
                except (EOFError, OSError):
                    answer = (subject, _died(subject, self._end(ready)), 0)
                    idle.append(self._begin())
                yield answer

    def _begin(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

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

    from autoquant.candidates import gemlite
    from autoquant.profiler.timing import Problem

    torch.set_num_threads(1)
    inductor_config.compile_threads = 1
    gemlite.load_tuning(tuning)
    gemlite.tune_briefly()
    problems: dict[tuple[LinearShape, int], Problem] = {}
    while True:
        try:
            subject: TimingSubject = connection.recv()
        except EOFError:
            break
        fmt = get_format(subject.format)
        key = (subject.shape, subject.m)
        if key not in problems:
            problems = {key: Problem(subject.shape, subject.m, device_name)}
        try:
            answer = try_out(subject, fmt, fmt.kernel(subject.kernel), problems[key], compiled=compiled)
        except Exception as error:  # noqa: BLE001 - out of memory, say: an outcome with its reason
            answer = Measurement(subject=subject, outcome="failed", reason=first_line(error)), 0
        if fmt.kernel(subject.kernel).opaque:
            gemlite.save_tuning(tuning)
        connection.send(answer)
        if answer[0].outcome == "failed" and not _is_sound(device_name):
            os._exit(1)  # the context is lost: a new process goes on


def _is_sound(device_name: str) -> bool:
    from autoquant.profiler.device import synchronize

    try:
        synchronize(device_name)
    except RuntimeError:
        return False
    return True
