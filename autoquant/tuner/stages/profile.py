"""The profile stage: how long every candidate takes for every linear."""

from __future__ import annotations

from dataclasses import replace

from autoquant.candidates.experts import cannot_hold_experts, multiplies_experts
from autoquant.candidates.formats.floats import original_format
from autoquant.devices.memory import release_memory
from autoquant.errors import WorkloadError
from autoquant.profiler.crossovers import Measure
from autoquant.profiler.measure import cells_of, subjects_of, working_set_bytes
from autoquant.profiler.record import mean_element_bytes
from autoquant.profiler.timing_table import TimingTable
from autoquant.records import Recording, TimingSubject
from autoquant.solver.constraints import Bound
from autoquant.tuner.choices import why_untimed
from autoquant.tuner.fusion import fusion_subjects
from autoquant.tuner.setup import SearchSetup


def searchable(
    setup: SearchSetup, recording: Recording, bound: Bound, timings: TimingTable
) -> Recording:
    """Return the recording without linears that have to stay as they are, and report these.

    What cannot be timed unquantized has nothing to be compared with.

    Raises:
        WorkloadError: No linear is left.
    """
    settled = setup.settled
    constraints = settled.request.constraints
    kept = []
    for site in recording.sites:
        why = why_untimed(site, settled.candidates, timings)
        original = original_format(site.shape.dtype)
        free = not bound.group_of(site.name) and constraints.admits(
            site.name, f"{original}/matmul", original
        )
        if why and free:
            setup.tell(f"left unquantized: {site.name}: {why}")
        else:
            kept.append(site)
    if not kept:
        raise WorkloadError(
            f"no linear of the model can be timed on this device, the first since {why}"
        )
    names = {site.name for site in kept}
    sites = tuple(
        replace(site, siblings=tuple(name for name in site.siblings if name in names))
        for site in kept
    )
    tables = tuple(table for table in recording.tables if not table.tied or table.tied in names)
    return replace(recording, sites=sites, tables=tables)


def subjects_to_time(setup: SearchSetup, recording: Recording) -> tuple[list[TimingSubject], int]:
    """Return every candidate at the workload's m, and the bytes of a working set.

    With `fuse`, also linears computed as one.
    """
    settled = setup.settled
    shapes = [site.shape for site in recording.sites]
    element_bytes = mean_element_bytes(settled.loaded.module, recording)
    working_set = working_set_bytes(shapes, settled.hardware, element_bytes)
    linears = [site for site in recording.sites if site.experts == 1]
    of_experts = [site for site in recording.sites if site.experts > 1]
    able = [
        each
        for each in settled.candidates
        if not cannot_hold_experts(each.format, settled.hardware.type)
        and multiplies_experts(each.kernel, settled.hardware.type)
    ]
    subjects = [
        *subjects_of(cells_of(linears), settled.candidates, working_set),
        *subjects_of(cells_of(of_experts), able, working_set),
    ]
    if setup.fuse:
        subjects += fusion_subjects(recording.sites, settled.candidates, working_set)
    return list(dict.fromkeys(subjects)), working_set


def profile_linears(setup: SearchSetup, recording: Recording, measure: Measure) -> TimingTable:
    """Time every candidate at the workload's m, or take it from the store."""
    subjects, working_set = subjects_to_time(setup, recording)
    timings = TimingTable(working_set, measure(subjects))
    release_memory()
    return timings
