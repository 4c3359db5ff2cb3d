"""The host's memory: how much there is, and given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

from autoquant.errors import DeviceError
from autoquant.files import size_bytes

LIMIT_VARIABLE = "AUTOQUANT_DEVICE_MEMORY"
"""Names how much of a device's memory models and what they compute may take, such as `8GiB`."""
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


def leave_out_of_collections() -> None:
    """Have collections leave out what exists now, too, where they leave out something already.

    To be called where all that exists is needed further: libraries that were imported since, say.
    """
    if gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def memory_limit() -> int | None:
    """Return the bytes that the user allows on a device, or None.

    Raises:
        DeviceError: The variable holds no size.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    if not text:
        return None
    if (limit := size_bytes(text)) is None:
        raise DeviceError(
            f"{LIMIT_VARIABLE}: cannot read {text!r}; write a size such as 8GiB, or unset it"
        )
    return limit


def available_bytes() -> int | None:
    """Return how much memory this process may still take, or None if unknown.

    Pages of files count as free: the system takes them back when others need the memory.
    """
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        left = limit - int((_CGROUP / "memory.current").read_text()) + _file_bytes()
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return free_kib << 10
    return min(free_kib << 10, left)


def _file_bytes() -> int:
    """Return how much of the control group's memory holds pages of files."""
    lines = (_CGROUP / "memory.stat").read_text().splitlines()
    values = dict(line.split() for line in lines)
    return int(values.get("inactive_file", 0)) + int(values.get("active_file", 0))


def lacks_memory(error: BaseException) -> bool:
    """Check whether PyTorch raised `error` because a tensor found no memory."""
    import torch

    # There is no type for the host's memory.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def own_bytes(process: int) -> int:
    """Return how much memory a process has, without pages of files; 0 if unknown.

    A process that reads mapped weights has as many pages of them as the system has room for.
    """
    try:
        _, resident, shared = (_PROC / str(process) / "statm").read_text().split()[:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
