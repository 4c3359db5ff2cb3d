"""The candidates of a model's linears, measured."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from autoquant.candidates import Candidate, known_formats, timed
from autoquant.candidates.formats.floats import original_format
from autoquant.candidates.kernels.caches import load_tuning, tuning_folder, use_kernel_caches
from autoquant.devices import backend
from autoquant.errors import CandidateError
from autoquant.events import Listener, Notice, StageFinished, StageProgress, StageStarted
from autoquant.profiler.arena import Arena
from autoquant.profiler.hopeless import Hopeless
from autoquant.profiler.prepare import prepare
from autoquant.profiler.timing import compare
from autoquant.records import Device, LinearShape, Measurement, Roofline, Site, TimingSubject

STAGE = "profile"
Candidates = Sequence[Candidate]
_UNUSED = "it is not used there"
_SMALLEST_WORKING_SET = 1 << 20


def working_set_bytes(shapes: Sequence[LinearShape], device: Device, element_bytes: int) -> int:
    """Return the bytes that a timing rotates through, so that weights are as cold as in the model.

    These are the bytes of all weights, or twice the last-level cache if that is less.

    The result is a power of two, so that models of similar size share their timings. The weights'
    size is rounded down. Twice the cache is rounded up, so that it does not fit into the cache.
    """
    model = max(sum(shape.n * shape.k for shape in shapes) * element_bytes, _SMALLEST_WORKING_SET)
    if model > 2 * device.cache_bytes:
        return max(1 << (2 * device.cache_bytes - 1).bit_length(), _SMALLEST_WORKING_SET)
    return 1 << (model.bit_length() - 1)


def cells_of(sites: Sequence[Site]) -> list[tuple[LinearShape, int]]:
    """Return every distinct (shape, m) of the sites, in their order."""
    return list(dict.fromkeys((site.shape, use.m) for site in sites for use in site.uses))


def subjects_of(
    cells: Sequence[tuple[LinearShape, int]], candidates: Candidates, working_set: int
) -> list[TimingSubject]:
    """Return every candidate at every cell.

    Formats that differ only in their rounding count as one.
    """
    return [
        TimingSubject(
            shape=shape,
            m=m,
            format=candidate.format.id,
            kernel=candidate.kernel.id,
            working_set_bytes=working_set,
        )
        for shape, m in cells
        for candidate in timed(candidates)
    ]


def with_original(candidates: Candidates, dtype: str) -> list[Candidate]:
    """Return the candidates, and first the unquantized weight, which no glob can exclude.

    Raises:
        CandidateError: Nothing computes with weights of that dtype.
    """
    original = known_formats().get(original_format(dtype))
    if original is None:
        raise CandidateError(
            f"the weights are {dtype}, which no candidate computes with: give --dtype fp32, and"
            " sample inputs that suit it"
        )
    rest = [candidate for candidate in candidates if candidate.format.id != original.id]
    return [*(Candidate(original, kernel) for kernel in original.kernels), *rest]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingDevice:
    """The device that linears are measured on.

    Attributes:
        device: The torch device to run on.
        hardware: Its fingerprint.
        roofline: Returns its limits; called only if candidates are prepared.
    """

    device: str
    hardware: Device
    roofline: Callable[[], Roofline]


def measure(
    subjects: Sequence[TimingSubject],
    candidates: Candidates,
    place: TimingDevice,
    *,
    on_measured: Callable[[Sequence[Measurement]], None],
    listener: Listener,
    on_candidate: Callable[[TimingSubject | None], None] = lambda _subject: None,
    hopeless: Hopeless | None = None,
) -> None:
    """Measure every subject, one shape and m after the other.

    Args:
        subjects: Those of one shape and m are compared with one another; all have the same working
            set.
        candidates: The formats and kernels that the subjects name.
        on_measured: Takes the measurements of a shape and m as soon as they are made.
        on_candidate: Takes the subject that is at work alone, or None before all of a shape and m
            are timed in turn.
        hopeless: Rules candidates out that need not be timed. None to time all.
    """
    cells: dict[tuple[LinearShape, int], list[TimingSubject]] = {}
    for subject in subjects:
        cells.setdefault((subject.shape, subject.m), []).append(subject)
    device_type = place.hardware.type
    decided: dict[TimingSubject, Measurement] = {}
    if subjects and backend(place.device).prepares:
        decided |= hopeless.among(subjects, device_type) if hopeless else {}
        waiting = [subject for cell in cells.values() for subject in cell]
        decided |= _prepare([each for each in waiting if each not in decided], place, listener)
    listener(StageStarted(STAGE, len(subjects)))
    if not subjects:
        return
    by_id = {candidate.id: candidate for candidate in timed(candidates)}
    arena = Arena(subjects[0].working_set_bytes, place.device)
    done = 0
    for (shape, m), cell in cells.items():
        if hopeless:
            decided |= hopeless.among([each for each in cell if each not in decided], device_type)
        with quiet_compiler(place.device):
            measured = compare(
                shape,
                m,
                [by_id[subject.candidate] for subject in cell],
                arena=arena,
                compiled=place.hardware.versions.get("compiler") != "none",
                decided=decided,
                on_candidate=partial(_tell, listener, done, on_candidate),
            )
        on_measured(measured)
        if hopeless:
            hopeless.learn(measured)
        done += len(cell)
        if reason := next((m.reason for m in measured if m.outcome == "ok" and m.reason), ""):
            listener(Notice(f"{shape} m={m}: {reason}; close other programs for timings to trust"))


def summarize(
    result: Mapping[TimingSubject, Measurement], measured: int, listener: Listener
) -> None:
    """Report the end of the stage, with a notice for each candidate that cannot be used.

    Args:
        measured: How many of the measurements were made now.
    """
    _tell_unusable(result, listener)
    counts = Counter(measurement.outcome for measurement in result.values())
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    made = f"{measured} measured now, {len(result) - measured} from the store"
    listener(StageFinished(STAGE, f"{len(result)} timings ({outcomes}), {made}"))


def _prepare(
    subjects: Sequence[TimingSubject], place: TimingDevice, listener: Listener
) -> Mapping[TimingSubject, Measurement]:
    """Compile and tune in parallel processes; return the outcomes that need no timing."""
    use_kernel_caches()
    listener(StageStarted("prepare", len(subjects)))
    prepared = prepare(
        subjects,
        device=place.hardware,
        device_name=place.device,
        roofline=place.roofline,
        on_progress=lambda done, what: listener(StageProgress("prepare", done, what)),
    )
    load_tuning(tuning_folder(place.hardware))
    counts = Counter(measurement.outcome for measurement in prepared.decided.values())
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    tried = f"{prepared.tried} candidates tried out ({prepared.work_s:.0f} s of work)"
    listener(StageFinished("prepare", f"{tried}; not to be timed: {outcomes or 'none'}"))
    return prepared.decided


@contextmanager
def quiet_compiler(device: str) -> Iterator[None]:
    """Inside, the compiler gives no warnings.

    Nor does it start helper processes where candidates are prepared: all it needs is in its cache.
    """
    import torch._inductor.config as inductor_config

    threads = (
        inductor_config.patch(compile_threads=1) if backend(device).prepares else nullcontext()
    )
    with warnings.catch_warnings(), threads:
        warnings.simplefilter("ignore")
        yield


def _tell(
    listener: Listener,
    done: int,
    on_candidate: Callable[[TimingSubject | None], None],
    subject: TimingSubject | None,
) -> None:
    on_candidate(subject)
    if subject is not None:
        what = f"{subject.shape} m={subject.m} {subject.candidate}"
        listener(StageProgress(STAGE, done, what))


def _tell_unusable(result: Mapping[TimingSubject, Measurement], listener: Listener) -> None:
    """Give one notice for each candidate that failed or was incorrect, with the first reason."""
    unusable: dict[tuple[str, str], list[Measurement]] = {}
    for subject, measurement in result.items():
        if measurement.outcome in ("incorrect", "failed"):
            unusable.setdefault((subject.candidate, measurement.outcome), []).append(measurement)
    for (candidate, outcome), measurements in unusable.items():
        where = ", ".join(dict.fromkeys(f"m={m.subject.m}" for m in measurements))
        listener(
            Notice(
                f"{candidate} is {outcome} in {len(measurements)} cases ({where}):"
                f" {measurements[0].reason}; {_UNUSED}"
            )
        )
