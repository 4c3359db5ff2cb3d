"""The campaign: every shape and m of a model, by every candidate, measured once and kept."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

from autoquant.candidates import Candidate, timed
from autoquant.candidates.kernels.caches import tuning_folder, use_kernel_caches
from autoquant.candidates.kernels.gemlite import load_tuning
from autoquant.events import Listener, Notice, StageFinished, StageProgress, StageStarted
from autoquant.profiler.prepare import prepare
from autoquant.profiler.roofline import known_roofline
from autoquant.profiler.timing import PROTOCOL, Arena, compare
from autoquant.records import Device, LinearShape, Measurement, Site, TimingSubject
from autoquant.store import Store

STAGE = "profile"
_UNUSED = "it is not used there"
_SMALLEST_WORKING_SET = 1 << 20


def working_set_bytes(shapes: Sequence[LinearShape], device: Device, element_bytes: int) -> int:
    """How cold the weights of these linears are: their size or twice the last-level cache, whichever is smaller.

    Rounded to a power of two, so that models of similar size share their timings: down where it is the weights' size, which is
    not to be overstated, up where it is the cache's, which must not hold it.
    """
    model = max(sum(shape.n * shape.k for shape in shapes) * element_bytes, _SMALLEST_WORKING_SET)
    if model > 2 * device.cache_bytes:
        return max(1 << (2 * device.cache_bytes - 1).bit_length(), _SMALLEST_WORKING_SET)
    return 1 << (model.bit_length() - 1)


def cells_of(sites: Sequence[Site]) -> list[tuple[LinearShape, int]]:
    """Every distinct (shape, m) of the sites, in the order in which they appear."""
    return list(dict.fromkeys((site.shape, use.m) for site in sites for use in site.uses))


def subjects_of(
    cells: Sequence[tuple[LinearShape, int]], candidates: Sequence[Candidate], working_set: int
) -> list[TimingSubject]:
    """Every candidate at every cell; formats that differ in their rounding alone are one."""
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


def profile(
    subjects: Sequence[TimingSubject],
    candidates: Sequence[Candidate],
    *,
    device: Device,
    device_name: str,
    store: Store,
    listener: Listener,
) -> dict[TimingSubject, Measurement]:
    """Measure what the store does not hold yet, keeping each (shape, m) as it is done.

    Args:
        subjects: Those of one shape and m are compared with one another; all have the same working set.
        candidates: The formats and kernels that the subjects name.
        device: The fingerprint that the measurements belong to.
        device_name: The torch device to run on.

    Returns:
        The measurements of the subjects, old and new.
    """
    known = store.timings(device, PROTOCOL)
    missing: dict[tuple[LinearShape, int], list[TimingSubject]] = {}
    for subject in subjects:
        if subject not in known:
            missing.setdefault((subject.shape, subject.m), []).append(subject)
    total = sum(len(group) for group in missing.values())
    decided: Mapping[TimingSubject, Measurement] = {}
    if total and device.type == "cuda":
        decided = _prepare(missing, device, device_name, store, listener)
    listener(StageStarted(STAGE, total))
    by_id = {candidate.id: candidate for candidate in timed(candidates)}
    compiled = device.versions.get("compiler") != "none"
    arena = Arena(subjects[0].working_set_bytes, device_name) if total else None
    done = 0
    for (shape, m), group in missing.items():
        assert arena is not None
        with quiet_compiler(device.type):
            measured = compare(
                shape,
                m,
                [by_id[subject.candidate] for subject in group],
                arena=arena,
                device=device_name,
                compiled=compiled,
                decided=decided,
                on_candidate=partial(_tell, listener, done, f"{shape} m={m}"),
            )
        store.put_timings(device, PROTOCOL, measured)
        known |= {measurement.subject: measurement for measurement in measured}
        done += len(group)
        if reason := next((m.reason for m in measured if m.outcome == "ok" and m.reason), ""):
            listener(Notice(f"{shape} m={m}: {reason}; close other programs for timings to trust"))
    result = {subject: known[subject] for subject in subjects}
    _tell_unusable(result, listener)
    listener(StageFinished(STAGE, _summary(result, total)))
    return result


def _prepare(
    missing: Mapping[tuple[LinearShape, int], Sequence[TimingSubject]],
    device: Device,
    device_name: str,
    store: Store,
    listener: Listener,
) -> Mapping[TimingSubject, Measurement]:
    """Compile and tune in parallel processes; returns the outcomes that need no timing."""
    use_kernel_caches()
    subjects = [subject for group in missing.values() for subject in group]
    listener(StageStarted("prepare", len(subjects)))
    prepared = prepare(
        subjects,
        device=device,
        device_name=device_name,
        roofline=lambda: known_roofline(device, device_name, store, listener),
        on_progress=lambda done, what: listener(StageProgress("prepare", done, what)),
    )
    load_tuning(str(tuning_folder(device)))
    counts = Counter(measurement.outcome for measurement in prepared.decided.values())
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    tried = f"{prepared.tried} candidates tried out ({prepared.work_s:.0f} s of work)"
    listener(StageFinished("prepare", f"{tried}; not to be timed: {outcomes or 'none'}"))
    return prepared.decided


@contextmanager
def quiet_compiler(device_type: str) -> Iterator[None]:
    """Keep the compiler's chatter about dtypes it mixes to itself.

    On GPUs, where its work comes from its cache, its helper processes are kept away too.
    """
    import torch._inductor.config as inductor_config

    threads = inductor_config.patch(compile_threads=1) if device_type == "cuda" else nullcontext()
    with warnings.catch_warnings(), threads:
        warnings.simplefilter("ignore")
        yield


def _tell(listener: Listener, done: int, subject: str, candidate: str) -> None:
    listener(StageProgress(STAGE, done, f"{subject} {candidate}"))


def _tell_unusable(result: dict[TimingSubject, Measurement], listener: Listener) -> None:
    """One notice for each candidate that failed or computed something else, with the first reason."""
    unusable: dict[tuple[str, str], list[Measurement]] = {}
    for subject, measurement in result.items():
        if measurement.outcome in ("incorrect", "failed"):
            unusable.setdefault((subject.candidate, measurement.outcome), []).append(measurement)
    for (candidate, outcome), measurements in unusable.items():
        where = ", ".join(dict.fromkeys(f"m={m.subject.m}" for m in measurements))
        listener(
            Notice(
                f"{candidate} is {outcome} in {len(measurements)} cases ({where}): {measurements[0].reason}; {_UNUSED}"
            )
        )


def _summary(result: dict[TimingSubject, Measurement], measured: int) -> str:
    counts: dict[str, int] = {}
    for measurement in result.values():
        counts[measurement.outcome] = counts.get(measurement.outcome, 0) + 1
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{len(result)} timings ({outcomes}), {measured} measured now, {len(result) - measured} from the store"
