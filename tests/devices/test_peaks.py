"""The most memory that work takes."""

import gc
import os
import subprocess
import sys

import pytest
import torch

from autoquant.devices import peaks
from autoquant.devices.memory import own_bytes
from autoquant.devices.peaks import PeakMemory

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def memory(monkeypatch):
    """Looks often, and not at processes that earlier tests have left."""
    below = peaks._below
    left = set(below(os.getpid()))
    monkeypatch.setattr(
        peaks, "_below", lambda process: [each for each in below(process) if each not in left]
    )
    monkeypatch.setattr(peaks, "_LOOK_S", 0.005)
    gc.collect()
    watch = PeakMemory("cpu")
    yield watch
    watch.stop()


@linux
def test_memory_that_was_freed_counts_once(memory):
    memory.take()
    before = memory.take()["host"]
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert own_bytes_seen(memory) > before + 40 * MIB
    del held
    memory.take()
    assert memory.take()["host"] < before + 30 * MIB


def own_bytes_seen(memory):
    memory._ended.wait(0.05)
    return memory.take()["host"]


@linux
def test_pages_of_files_do_not_count(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * MIB))
    before = own_bytes(os.getpid())
    mapped = torch.from_file(str(path), size=64 * MIB, dtype=torch.uint8)
    mapped.sum()
    assert own_bytes(os.getpid()) < before + 30 * MIB


@linux
def test_the_largest_process_below_counts_too(memory):
    code = f"held = bytearray({64 * MIB}); print(1, flush=True); input()"
    before = memory.take()["host"]
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        assert own_bytes_seen(memory) > before + 40 * MIB
        child.communicate(b"\n")


def test_a_cpu_has_no_memory_of_its_own(memory):
    assert "device" not in memory.take()
