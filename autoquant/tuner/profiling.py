"""The profile stage: times what the store does not know, and saves it at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from autoquant.errors import HungError, ProcessDiedError, WorkerLostError
from autoquant.events import Event, Listener, StageProgress, StageStarted
from autoquant.profiler import measure
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Device, LinearShape, Measurement, TimingSubject
from autoquant.store import Store
from autoquant.tuner.workers.crew import MOST_LOST, Begun, begin, count, next_done
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
    together: bool = False,
) -> dict[TimingSubject, Measurement]:
    """Time the subjects that the store does not know; return the measurements of all.

    If the process dies, the subjects that were at work are tried one by one, and those that bring
    a process down alone have failed. A candidate that hung once, or ended a process twice, is not
    tried any more. The rest goes on.

    Args:
        together: Each of several workers gets one share of all shapes, whose candidates it prepares
            together. Otherwise it gets one shape and m after the other.

    Raises:
        ProcessDiedError: It died twice without a measurement in between, and no subject does that
            alone (out of memory, say). Or ever more workers were lost.
    """
    known = store.timings(hardware, PROTOCOL)
    before = {subject for subject in subjects if subject in known}
    keep = keeper(store, hardware, known)
    if len(before) == len(set(subjects)):
        listener(StageStarted(measure.STAGE, 0))
    crowd = count(runner)
    tell = listener if crowd == 1 else _Whole(len(set(subjects)) - len(before), known, listener)
    died_at = lost_at = -1
    lost = 0
    while missing := [subject for subject in subjects if subject not in known]:
        for share, death in _timed(
            _shares(missing, crowd, together=together),
            _Place(runner, hardware, store, known, keep, tell),
        ):
            missing = [subject for subject in subjects if subject not in known]
            if isinstance(death, WorkerLostError):  # no fault of what it timed
                lost = lost + 1 if lost_at == len(known) else 1
                lost_at = len(known)
                if lost > MOST_LOST * crowd:
                    raise death
                continue
            deaths: dict[TimingSubject, ProcessDiedError]
            if share.at_work and isinstance(death, HungError):  # it would hang as long again
                deaths = {share.at_work: death}
            else:  # something else may have killed the process
                left = [subject for subject in share.subjects if subject not in known]
                suspects = [share.at_work] if share.at_work else _first_cell(left)
                deaths = _deaths(suspects, runner, hardware)
            if not deaths and died_at == len(known):
                raise death
            died_at = -1 if deaths else len(known)
            keep(_failures(deaths, missing, known))
    result = {subject: known[subject] for subject in subjects}
    measure.summarize(result, len(result) - len(before), listener)
    return result


@dataclass(slots=True)
class _Share:
    """What one job times, and which of it is at work alone."""

    subjects: list[TimingSubject]
    at_work: TimingSubject | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where shares are timed, and where what they tell goes."""

    runner: Runner
    hardware: Device
    store: Store
    known: dict[TimingSubject, Measurement]
    keep: Callable[[Sequence[Measurement]], None]
    listener: Listener

    def begin(self, share: _Share) -> Begun[None]:
        history = tuple(each for each in self.known.values() if each.outcome == "ok")
        roofline = self.store.roofline(self.hardware)
        job = ProfileJob(share.subjects, self.hardware, roofline, history)
        return begin(self.runner, job, partial(self._take, share))

    def _take(self, share: _Share, message: Any) -> None:
        if isinstance(message, Timed):
            self.keep(message.measurements)
        elif isinstance(message, Limited):
            self.store.put_roofline(self.hardware, message.roofline)
        elif isinstance(message, AtWork):
            share.at_work = message.subject
        else:
            self.listener(message)


def _timed(shares: list[_Share], place: _Place) -> Iterator[tuple[_Share, ProcessDiedError]]:
    """Time shares, as many at a time as there are workers; yield those whose process died.

    A share is begun when a worker is free for it, so that it can use what was learnt before.
    """
    waiting, at_work = deque(shares), list[tuple[Begun[None], _Share]]()
    while waiting or at_work:
        while waiting and len(at_work) < count(place.runner):
            share = waiting.popleft()
            share.subjects = [each for each in share.subjects if each not in place.known]
            if not share.subjects:  # not to be tried any more
                continue
            at_work.append((place.begin(share), share))
        if not at_work:
            return
        done = next_done([begun for begun, _ in at_work])
        (share,) = (share for begun, share in at_work if begun is done)
        at_work = [each for each in at_work if each[0] is not done]
        try:
            done.result()
        except ProcessDiedError as death:
            yield share, death


def _shares(missing: Sequence[TimingSubject], workers: int, *, together: bool) -> list[_Share]:
    """Return the jobs that time the subjects: one for all, or several for several workers.

    Several begin with the largest, so that the last ones to end are small. They are dealt out
    forth and back, so that shares of all shapes are about equal.
    """
    if workers == 1:
        return [_Share(list(missing))]
    cells: dict[tuple[LinearShape, int], list[TimingSubject]] = {}
    for subject in missing:
        cells.setdefault((subject.shape, subject.m), []).append(subject)
    sizes = {cell: cell[0].n * cell[0].k * cell[1] for cell in cells}
    largest_first = [cells[cell] for cell in sorted(cells, key=lambda cell: -sizes[cell])]
    if not together:
        return [_Share(cell) for cell in largest_first]
    shares = [_Share([]) for _ in range(workers)]
    for number, cell in enumerate(largest_first):
        lap, place = divmod(number, workers)
        shares[place if lap % 2 == 0 else -1 - place].subjects.extend(cell)
    return [share for share in shares if share.subjects]


class _Whole:
    """Passes on what several jobs tell, with the progress of all of them."""

    def __init__(
        self, total: int, known: Mapping[TimingSubject, Measurement], listener: Listener
    ) -> None:
        self._known, self._listener = known, listener
        self._first = len(known)
        listener(StageStarted(measure.STAGE, total))

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == measure.STAGE:
            return None
        if isinstance(event, StageProgress) and event.stage == measure.STAGE:
            event = replace(event, done=len(self._known) - self._first)
        return self._listener(event)


def _first_cell(missing: Sequence[TimingSubject]) -> list[TimingSubject]:
    """Return what is missing of the first cell (shape and m): cells run in order."""
    if not missing:
        return []
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
