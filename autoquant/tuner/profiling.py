"""The profile stage: times what the store does not know, and saves it at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autoquant.errors import ProcessDiedError
from autoquant.events import Listener, StageStarted
from autoquant.profiler import measure
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Device, Measurement, TimingSubject
from autoquant.store import Store
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import Limited, ProfileJob, Timed


def keeper(
    store: Store, hardware: Device, known: dict[TimingSubject, Measurement]
) -> Callable[[Sequence[Measurement]], None]:
    """Return what saves measurements, and adds what the store then holds to those known."""

    def keep(measurements: Sequence[Measurement]) -> None:
        kept = store.put_timings(hardware, PROTOCOL, measurements)
        known.update({measurement.subject: measurement for measurement in kept})

    return keep


def measure_all(
    subjects: Sequence[TimingSubject],
    *,
    runner: Runner,
    hardware: Device,
    store: Store,
    listener: Listener,
) -> dict[TimingSubject, Measurement]:
    """Time the subjects that the store does not know; return the measurements of all.

    If the process dies, the subjects that were at work are tried one by one. Those that bring a
    process down alone have failed, and the rest goes on.

    Raises:
        ProcessDiedError: It died twice, and no subject does that alone (out of memory, say).
    """
    known = store.timings(hardware, PROTOCOL)
    before = {subject for subject in subjects if subject in known}
    keep = keeper(store, hardware, known)

    def on_message(message: Any) -> None:
        if isinstance(message, Timed):
            keep(message.measurements)
        elif isinstance(message, Limited):
            store.put_roofline(hardware, message.roofline)
        else:
            listener(message)

    if len(before) == len(set(subjects)):
        listener(StageStarted(measure.STAGE, 0))
    died_before = False
    while missing := [subject for subject in subjects if subject not in known]:
        try:
            runner.run(ProfileJob(missing, hardware, store.roofline(hardware)), on_message)
        except ProcessDiedError as death:
            crashed = [
                Measurement(subject=subject, outcome="failed", reason=reason)
                for subject in _at_work(subjects, known)
                if (reason := _dies_alone(subject, runner, hardware))
            ]
            if not crashed and died_before:
                raise death
            died_before = not crashed
            keep(crashed)
    result = {subject: known[subject] for subject in subjects}
    measure.summarize(result, len(result) - len(before), listener)
    return result


def _dies_alone(subject: TimingSubject, runner: Runner, hardware: Device) -> str:
    """Return how the process dies if only `subject` is timed, or an empty string if it does not."""
    try:
        runner.run(ProfileJob([subject], hardware), lambda _message: None)  # keeps no time
    except ProcessDiedError as death:
        return str(death)
    return ""


def _at_work(
    subjects: Sequence[TimingSubject], known: Mapping[TimingSubject, Measurement]
) -> Sequence[TimingSubject]:
    """Return what is missing of the first incomplete cell (shape and m). Cells run in order."""
    missing = [subject for subject in subjects if subject not in known]
    cell = missing[0].shape, missing[0].m
    return [subject for subject in missing if (subject.shape, subject.m) == cell]
