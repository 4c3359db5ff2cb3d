"""The host's memory, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator


def release_memory() -> None:
    """Collect garbage, and return what it held to the system."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Return freed memory that the C library keeps to the system. This takes a moment only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Inside, garbage collections leave out the objects that exist now.

    Imported libraries alone make half a second of each collection, and a search has hundreds.
    """
    if gc.get_freeze_count():  # somebody has done it, and undoing it is theirs
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
