"""Processes that end with the one that started them, and what they compute."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with(parent: int | None) -> None:
    """Have Linux kill this process when `parent`, which started it, ends.

    Elsewhere it ends when it next reads from the parent, or writes to it.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def computed_s(process: int) -> float:
    """Return the CPU time of a process, of all that it started, and of those that have ended.

    It is 0 without `/proc`.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        found = int(path.parent.name)
        parents[found] = int(fields[1])
        ticks[found] = sum(map(int, fields[11:15]))  # of itself and of its ended children
    own = {process}
    while more := {each for each, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(ticks.get(each, 0) for each in own) / os.sysconf("SC_CLK_TCK")
