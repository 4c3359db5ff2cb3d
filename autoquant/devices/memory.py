"""The host's memory: how much there is, and given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def release_memory() -> None:
    """Collect garbage, and return what it held to the system."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Give the system back the freed memory that the C library keeps. This is quick."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Inside, garbage collections leave out the objects that exist now.

    Imported libraries alone make half a second of each collection, and a search has hundreds.
    """
    if gc.get_freeze_count():  # a caller has frozen them, and will undo it
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def available_bytes() -> int | None:
    """Return how much memory this process may still take, or None if unknown."""
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        left = limit - int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return free_kib << 10
    return min(free_kib << 10, left)


def resident_bytes(process: int) -> int:
    """Return how much memory a process has; 0 if unknown."""
    try:
        pages = int((_PROC / str(process) / "statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
