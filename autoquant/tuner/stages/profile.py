"""The profile stage: how long every candidate takes for every linear."""

from __future__ import annotations

from autoquant.devices.memory import release_memory
from autoquant.profiler.crossovers import Measure
from autoquant.profiler.measure import cells_of, subjects_of, working_set_bytes
from autoquant.profiler.record import mean_element_bytes
from autoquant.profiler.timing_table import TimingTable
from autoquant.records import Recording
from autoquant.tuner.fusion import fusion_subjects
from autoquant.tuner.setup import SearchSetup


def profile_linears(setup: SearchSetup, recording: Recording, measure: Measure) -> TimingTable:
    """Time every candidate at the workload's m; with `fuse`, also linears computed as one."""
    shapes = [site.shape for site in recording.sites]
    element_bytes = mean_element_bytes(setup.loaded.module, recording)
    working_set = working_set_bytes(shapes, setup.hardware, element_bytes)
    subjects = subjects_of(cells_of(recording.sites), setup.candidates, working_set)
    if setup.fuse:
        subjects += fusion_subjects(recording.sites, setup.candidates, working_set)
    timings = TimingTable(working_set, measure(list(dict.fromkeys(subjects))))
    release_memory()
    return timings
