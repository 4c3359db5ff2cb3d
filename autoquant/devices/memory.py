"""The host's memory, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def release_memory() -> None:
    """Collect garbage, and return what it held to the system."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Return freed memory that the C library keeps to the system. This takes a moment only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
