"""Candidates compiled, tuned and tried out in parallel processes before any is timed.

A process compiles into caches on disk, which the timing process reads in a moment. Candidates that
fail, are incorrect or crash their process are known before they could disturb a comparison.
Candidates that cannot win by the roofline (see `autoquant.profiler.bounds`) are never compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from autoquant.candidates import Kernel, candidate_of
from autoquant.candidates.registry import is_registered_here
from autoquant.profiler.bounds import Tried, beaten, bounded
from autoquant.profiler.trials import Trial, Workers
from autoquant.records import Device, Measurement, Roofline, TimingSubject


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
        candidate = candidate_of(subject)
        if reason := candidate.unsupported_reason(subject.shape, subject.m, device.type):
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


_kept: ContextVar[dict[str, Workers] | None] = ContextVar("kept", default=None)


@contextmanager
def workers_kept() -> Iterator[None]:
    """Inside, the processes that one call of `prepare` started wait for the next."""
    kept: dict[str, Workers] = {}
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
        for workers in kept.values():
            workers.end()


@contextmanager
def _workers(device: Device, device_name: str) -> Iterator[Workers]:
    kept = _kept.get()
    workers = kept.pop(device_name, None) if kept is not None else None
    workers = workers or Workers(device, device_name)
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

    def take(self, trials: Iterator[Trial], *, tuned: bool) -> None:
        """Take in the trials of workers, from before or after tuning."""
        for trial in trials:
            subject = trial.measurement.subject
            self.seen.add(subject)
            self.work_s += trial.seconds
            self._on_progress(len(self.seen), subject.candidate)
            if trial.measurement.outcome == "ok":
                self._tried[subject] = Tried(min(trial.measurement.samples_us), trial.stored_bytes)
            elif _kernel(subject).tuned and not tuned:
                self._unsettled.append(subject)  # another setting may do
            else:
                self.decide(trial.measurement)

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
    return candidate_of(subject).kernel
