"""The profile stage: timings kept as they are made, and a candidate that brings its process down found and noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoquant.errors import ProcessDiedError
from autoquant.events import Listener
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Device, Measurement, TimingSubject
from autoquant.store import Store
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import Limited, ProfileJob, Timed


def measure_all(
    subjects: Sequence[TimingSubject], *, runner: Runner, hardware: Device, store: Store, listener: Listener
) -> dict[TimingSubject, Measurement]:
    """Time the subjects that the store does not know; returns the measurements of all.

    Where the process dies, the subjects that were at work are tried one by one: those that bring a process down on their own
    have failed, and the rest goes on.

    Raises:
        ProcessDiedError: It died, and no subject does that on its own (out of memory, say).
    """

    def on_message(message: Any) -> None:
        if isinstance(message, Timed):
            store.put_timings(hardware, PROTOCOL, message.measurements)
        elif isinstance(message, Limited):
            store.put_roofline(hardware, message.roofline)
        else:
            listener(message)

    while True:
        try:
            known = store.timings(hardware, PROTOCOL)
            return runner.run(ProfileJob(subjects, hardware, known, store.roofline(hardware)), on_message)
        except ProcessDiedError as death:
            crashed = [
                Measurement(subject=subject, outcome="failed", reason=reason)
                for subject in _at_work(subjects, store.timings(hardware, PROTOCOL))
                if (reason := _dies_alone(subject, runner, hardware))
            ]
            if not crashed:
                raise death
            store.put_timings(hardware, PROTOCOL, crashed)


def _dies_alone(subject: TimingSubject, runner: Runner, hardware: Device) -> str:
    """How the process dies when only `subject` is timed, which nobody believes then; empty where it does not."""
    try:
        runner.run(ProfileJob([subject], hardware, {}), lambda _message: None)
    except ProcessDiedError as death:
        return str(death)
    return ""


def _at_work(subjects: Sequence[TimingSubject], known: Mapping[TimingSubject, Measurement]) -> Sequence[TimingSubject]:
    """What is unknown of the first shape and m that have something unknown: they are timed in order."""
    missing = [subject for subject in subjects if subject not in known]
    return [subject for subject in missing if (subject.shape, subject.m) == (missing[0].shape, missing[0].m)]
