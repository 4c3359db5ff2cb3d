"""Recording a small module, and a machine that is never busy with anything else."""

from __future__ import annotations

import pytest
from models.tiny_models import as_loaded

from autoquant.devices.cpu import CpuBackend
from autoquant.profiler.record import record
from autoquant.records import Workload
from autoquant.runtime.phases import make_phases


@pytest.fixture
def recorded():
    """Record one forward pass of a module with these inputs."""

    def run(module, *inputs):
        phases = make_phases(as_loaded(module.eval(), "module", inputs), Workload.single())
        return record(module, phases)

    return run


@pytest.fixture
def other_load(monkeypatch):
    """The shares of the machine that others use in the comparisons to come; the last one stays.

    0 unless set.
    """
    shares = [0.0]

    class Watch:
        def share(self):
            return shares.pop(0) if len(shares) > 1 else shares[0]

    monkeypatch.setattr(CpuBackend, "watch_load", lambda _backend: Watch())
    return shares
