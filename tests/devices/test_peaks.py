"""The most memory that work takes.

What a process holds and frees is counted in one that does nothing else.
"""

import subprocess
import sys

import pytest

from autoquant.devices.peaks import PeakMemory

MIB = 1 << 20
BEGIN = f"""
import os, subprocess, sys, tempfile, time
import torch
from autoquant.devices import peaks
from autoquant.devices.memory import own_bytes

peaks._LOOK_S = 0.005
MIB = {MIB}
memory = peaks.PeakMemory("cpu")
torch.ones(8)
memory.take()
before = memory.take()["host"]

def taken():
    return (memory.take()["host"] - before) // MIB
"""


def printed(code):
    """What a new process prints: MiB more than at its beginning."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.processes
def test_memory_that_was_freed_counts_once():
    held, freed = printed("""
held = torch.ones(64 * MIB, dtype=torch.uint8)
time.sleep(0.05)
del held
print(taken(), taken())
""")
    assert 40 < held < 90
    assert freed < 30


@linux
@pytest.mark.processes
def test_pages_of_files_do_not_count():
    (more,) = printed("""
with tempfile.NamedTemporaryFile() as file:
    file.write(bytes(64 * MIB))
    file.flush()
    before = own_bytes(os.getpid())
    mapped = torch.from_file(file.name, size=64 * MIB, dtype=torch.uint8)
    mapped.sum()
    print((own_bytes(os.getpid()) - before) // MIB)
""")
    assert more < 30


@linux
@pytest.mark.processes
def test_the_largest_process_below_counts_too():
    (more,) = printed("""
code = f"held = bytearray({64 * MIB}); print(1, flush=True); input()"
pipe = subprocess.PIPE
with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as child:
    child.stdout.readline()
    time.sleep(0.05)
    print(taken())
    child.communicate(b"")
""")
    assert more > 40


def test_a_cpu_has_no_memory_of_its_own():
    memory = PeakMemory("cpu")
    assert "device" not in memory.take()
    memory.stop()
