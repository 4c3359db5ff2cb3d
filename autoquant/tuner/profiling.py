"""The profile stage: times what the store does not know, and saves it at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autoquant.errors import HungError, ProcessDiedError
from autoquant.events import Listener, StageStarted
from autoquant.profiler import measure
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Device, Measurement, TimingSubject
from autoquant.store import Store
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import AtWork, Limited, ProfileJob, Timed

_ENDED = "its process was ended"
"""Part of the reason of `ProcessDiedError` from a runner."""


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

    If the process dies, the subjects that were at work are tried one by one, and those that bring
    a process down alone have failed. A candidate that hung once, or ended a process twice, is not
    tried any more. The rest goes on.

    Raises:
        ProcessDiedError: It died twice, and no subject does that alone (out of memory, say).
    """
    known = store.timings(hardware, PROTOCOL)
    before = {subject for subject in subjects if subject in known}
    keep = keeper(store, hardware, known)

    at_work: list[TimingSubject | None] = [None]

    def on_message(message: Any) -> None:
        if isinstance(message, Timed):
            keep(message.measurements)
        elif isinstance(message, Limited):
            store.put_roofline(hardware, message.roofline)
        elif isinstance(message, AtWork):
            at_work[0] = message.subject
        else:
            listener(message)

    if len(before) == len(set(subjects)):
        listener(StageStarted(measure.STAGE, 0))
    died_before = False
    while missing := [subject for subject in subjects if subject not in known]:
        at_work[0] = None
        try:
            history = tuple(each for each in known.values() if each.outcome == "ok")
            runner.run(ProfileJob(missing, hardware, store.roofline(hardware), history), on_message)
        except ProcessDiedError as death:
            missing = [subject for subject in missing if subject not in known]
            if at_work[0] and isinstance(death, HungError):  # it would hang as long again
                deaths: dict[TimingSubject, ProcessDiedError] = {at_work[0]: death}
            else:  # something else may have killed the process
                suspects = [at_work[0]] if at_work[0] else _first_cell(missing)
                deaths = _deaths(suspects, runner, hardware)
            if not deaths and died_before:
                raise death
            died_before = not deaths
            keep(_failures(deaths, missing, known))
    result = {subject: known[subject] for subject in subjects}
    measure.summarize(result, len(result) - len(before), listener)
    return result


def _first_cell(missing: Sequence[TimingSubject]) -> list[TimingSubject]:
    """Return what is missing of the first cell (shape and m): cells run in order."""
    cell = missing[0].shape, missing[0].m
    return [subject for subject in missing if (subject.shape, subject.m) == cell]


def _deaths(
    suspects: Sequence[TimingSubject], runner: Runner, hardware: Device
) -> dict[TimingSubject, ProcessDiedError]:
    """Time subjects one by one; return those that brought their process down, and how."""
    found = {}
    for subject in suspects:
        try:
            runner.run(ProfileJob([subject], hardware), lambda _message: None)  # keeps no time
        except ProcessDiedError as death:
            found[subject] = death
    return found


def _failures(
    deaths: Mapping[TimingSubject, ProcessDiedError],
    missing: Sequence[TimingSubject],
    known: Mapping[TimingSubject, Measurement],
) -> list[Measurement]:
    """Return the failures, also those of what is not tried any more."""
    reasons = {subject: str(death) for subject, death in deaths.items()}
    for dead, death in deaths.items():
        before = any(
            subject.candidate == dead.candidate and _ENDED in found.reason
            for subject, found in known.items()
        )
        if before or isinstance(death, HungError):
            where = f"not tried: at {dead.shape} m={dead.m} {reasons[dead]}"
            for subject in missing:
                if subject.candidate == dead.candidate:
                    reasons.setdefault(subject, where)
    return [
        Measurement(subject=subject, outcome="failed", reason=reason)
        for subject, reason in reasons.items()
    ]
