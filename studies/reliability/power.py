"""Cut the power of a virtual disk again and again, and see whether facts that were told are there.

    python studies/reliability/power.py [--cuts 50] [--synchronous FULL] [--out FILE]

Needs root on Linux, for a file system in a file (ext4, loop device). A process writes facts into a
database there, and tells each one once it is saved. At a random moment it is stopped, and the file
is copied as it is: it holds what the file system has sent to the disk, and nothing that was still
in memory, as after a loss of power. The copy is mounted, and the database opened: it must be sound,
hold every fact that was told, and each pair of facts whole. With `--synchronous NORMAL`, which
autoquant used before, facts that were told are lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

_SIZE_BYTES = 24 << 20
_COMMIT_S = 900  # the file system itself must not save anything by chance
_WRITER = """
import os, sys
sys.path.insert(0, "tests")
from sqlalchemy import event
from autoquant.store import open_store
from store.made_up import DEVICE, fill, measurement

store = open_store(sys.argv[1])
event.listen(store.engine, "connect", lambda connection, _record: connection.execute(
    f"PRAGMA synchronous = {sys.argv[2]}"))
store.engine.dispose()
fill(store)
print("ready", flush=True)
for m in range(1, 100000):
    store.put_timings(DEVICE, "1", [measurement(m=m), measurement(m=m, kernel="other")])
    print(m, flush=True)
"""


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mount a file system that lies in a file."""
    folder.mkdir(exist_ok=True)
    options = f"loop,commit={_COMMIT_S}"
    subprocess.run(["mount", "-o", options, str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def cut(place: Path, synchronous: str, seconds: float) -> tuple[int, list[str]]:
    """Write for some seconds, cut the power; return how many facts were told, and what is wrong."""
    image, copy = place / "disk", place / "copy"
    with image.open("wb") as file:
        file.truncate(_SIZE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with mounted(image, place / "mounted") as folder:
        command = [sys.executable, "-c", _WRITER, str(folder / "plan.db"), synchronous]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(seconds)
            writer.send_signal(signal.SIGSTOP)
            while f"{Path(f'/proc/{writer.pid}/stat').read_text().rpartition(')')[2]}"[1] != "T":
                time.sleep(0.001)
            shutil.copyfile(image, copy)
            writer.kill()
            told = [int(line) for line in writer.stdout.read().split()]
    with mounted(copy, place / "mounted") as folder:
        return len(told), faults(folder / "plan.db", told[-1] if told else 0)


def faults(db: Path, told: int) -> list[str]:
    """Return what is wrong with a database that must hold the pairs of facts 1 to `told`."""
    with closing(sqlite3.connect(db)) as connection:
        sound = connection.execute("PRAGMA integrity_check").fetchall()
        rows = connection.execute("SELECT m, count(*) FROM timing GROUP BY m ORDER BY m").fetchall()
    found = [] if sound == [("ok",)] else [f"integrity: {sound[:2]}"]
    if any(count != 2 for _, count in rows):
        found.append("a pair of facts is not whole")
    if [m for m, _ in rows] != list(range(1, len(rows) + 1)):
        found.append("facts in the middle are missing")
    if len(rows) < told:
        found.append(f"{told - len(rows)} of {told} facts that were told are lost")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--synchronous", choices=("FULL", "NORMAL"), default="FULL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    told, wrong = 0, []
    with tempfile.TemporaryDirectory(prefix="power-") as place:
        for number in range(arguments.cuts):
            facts, found = cut(Path(place), arguments.synchronous, draw.uniform(0, 2))
            told += facts
            wrong += [f"cut {number + 1}: {fault}" for fault in found]
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "synchronous": arguments.synchronous,
        "cuts": arguments.cuts,
        "facts_told": told,
        "faults": wrong,
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "linux": os.uname().release,
        },
    }
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
