"""A process that ends without warning loses nothing that it had put away."""

import os
import signal
import subprocess
import sys

import pytest
from builders.rich import DEVICE

from autoquant.store import open_store

pytestmark = pytest.mark.processes
WRITER = """
import os, sys
from autoquant.store import open_store
from builders.rich import DEVICE, fill, measurement

store = open_store(sys.argv[1])
fill(store)
for m in range(1, 1000):
    store.put_timings(DEVICE, "1", [measurement(m=m), measurement(m=m, kernel="other")])
    print(m, flush=True)
    if sys.argv[2] == "exit" and m == 5:
        os._exit(9)
"""


def write_until(path, ending, rows=0):
    """Run the writer until it ends itself, or until it has said that it has written `rows` pairs
    and is killed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", WRITER, str(path), ending]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        said = 0
        for line in process.stdout:
            said = int(line)
            if ending == "kill" and said >= rows:
                process.send_signal(signal.SIGKILL)
                break
        rest = process.stdout.read().split()
        process.wait()
    return int(rest[-1]) if rest else said


def test_a_process_that_died_while_it_made_the_database_leaves_one_that_can_be_made(path):
    """The file is there already, its tables are not."""
    dying = "import os, sys, alembic.command\nalembic.command.upgrade = lambda *_: os._exit(9)\n"
    command = [sys.executable, "-c", dying + WRITER, str(path), "exit"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run(command, env=environment).returncode == 9
    assert path.exists()
    store = open_store(path)
    assert store.studies() == []
    store.close()


@pytest.mark.parametrize(("ending", "rows"), [("exit", 5), ("kill", 3), ("kill", 40)])
def test_what_was_put_before_the_process_died_is_there_and_whole(path, ending, rows):
    said = write_until(path, ending, rows)
    store = open_store(path, create=False)
    timings = store.timings(DEVICE, "1")
    store.close()
    found = {m: [s.kernel for s in timings if s.m == m] for m in {subject.m for subject in timings}}
    assert set(found) >= set(range(1, said + 1)) and len(found) <= said + 1
    assert all(sorted(kernels) == ["matmul", "other"] for kernels in found.values())
