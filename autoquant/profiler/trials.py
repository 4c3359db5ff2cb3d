"""Processes that try candidates out, one at a time each."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from autoquant.candidates import candidate_of
from autoquant.candidates.kernels.caches import (
    load_tuning,
    save_tuning,
    tune_briefly,
    tuning_folder,
    untuned,
    use_kernel_caches,
)
from autoquant.devices import backend
from autoquant.devices.effort import TimingEffort, timing_effort, use_timing_effort
from autoquant.errors import first_line
from autoquant.files import raise_if_full
from autoquant.processes import die_with
from autoquant.profiler.entrant import LinearToTime
from autoquant.profiler.timing import try_out
from autoquant.records import Device, Measurement, TimingSubject

_MOST_PROCESSES = 16
_BYTES_PER_WEIGHT = 20
_CONTEXT_BYTES = 1 << 30
_LONGER_TO_TUNE = 5
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of trying one candidate out."""

    measurement: Measurement
    stored_bytes: int = 0
    seconds: float = 0.0


class Workers:
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

    def run(self, subjects: Sequence[TimingSubject], *, tune: bool) -> Iterator[Trial]:
        """Give the subjects to the processes; yield trials as they come.

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
                yield Trial(_failed(subject, f"did not end within {limit_s:.0f} s"))
            for ready in wait(list(at_work), _LOOK_S):
                assert isinstance(ready, Connection)
                subject = at_work.pop(ready)
                try:
                    trial: Trial = ready.recv()
                    idle.append(ready)
                except (EOFError, OSError):
                    exit_code = self._end(ready)
                    idle.append(self._begin())
                    if subject not in died:  # it may have been killed from outside
                        died.add(subject)
                        waiting.append(subject)
                        continue
                    trial = Trial(_died(subject, exit_code))
                yield trial

    def _fitting(self, subjects: Sequence[TimingSubject]) -> int:
        """Return how many processes, each with a weight in several forms, fit into memory."""
        free_bytes = backend(self._device_name).free_bytes()
        if free_bytes is None or not subjects:
            return len(subjects)
        largest = max(_BYTES_PER_WEIGHT * subject.shape.n * subject.shape.k for subject in subjects)
        started = len(self._processes)
        # Those that have started hold their contexts already, but not their weights.
        left_bytes = free_bytes - started * largest
        return max(1, started + int(left_bytes // (largest + _CONTEXT_BYTES)))

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
        try:
            if linear is None or (linear.shape, linear.m) != (subject.shape, subject.m):
                linear = None  # frees its memory first
                linear = LinearToTime(subject.shape, subject.m, device_name)
            candidate = candidate_of(subject)
            with nullcontext() if tune else untuned(timed=True):
                measurement, stored = try_out(subject, candidate, linear, compiled=compiled)
        except Exception as error:  # noqa: BLE001 - out of memory, say: an outcome with its reason
            raise_if_full(error)
            reason = first_line(error, with_type=True)
            measurement = Measurement(subject=subject, outcome="failed", reason=reason)
            stored = 0
        if tune:
            save_tuning(tuning)
        connection.send(Trial(measurement, stored, time.monotonic() - started))
        if measurement.outcome == "failed" and not _is_sound(device_name):
            os._exit(1)  # the context is lost: a new process goes on


def _is_sound(device_name: str) -> bool:
    """Check that the device still computes: a kernel may have broken its context."""
    try:
        backend(device_name).synchronize()
    except RuntimeError:
        return False
    return True
