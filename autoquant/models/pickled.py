"""Look into a pickle without running it."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import IO

_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_SILENT = ("PROTO", "FRAME", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", *_STRINGS)
# Before the object, the old format of torch.save has a magic number, a version and facts about
# the machine.
_PICKLES_OF_OLD_FORMAT = 4
# What opening a file as a pickle, or reading its opcodes, raises for one that is none.
_UNREADABLE = (
    OSError,
    StopIteration,
    zipfile.BadZipFile,
    ValueError,
    IndexError,
    OverflowError,
    MemoryError,
)


def is_pickle(path: Path, *, is_zip: bool) -> bool:
    """Check whether the file is a pickle, or a torch file around one."""
    try:
        with _opened(path, is_zip=is_zip) as file:
            starts = file.read(1) == pickle.PROTO
            file.seek(0)
            return starts and all(True for _ in pickletools.genops(file))
    except _UNREADABLE:
        return False


def pickled_class(path: Path, *, is_zip: bool) -> str:
    """Return the `package.module.Class` of the object in the file; empty if unknown."""
    try:
        with _opened(path, is_zip=is_zip) as file:
            names = (_first_name(file) for _ in range(_PICKLES_OF_OLD_FORMAT))
            return next(filter(None, names), "")
    except _UNREADABLE:
        return ""


def _opened(path: Path, *, is_zip: bool) -> IO[bytes]:
    """Open the pickle. Raises StopIteration for an archive without one."""
    if not is_zip:
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return io.BytesIO(archive.read(name))


def _first_name(file: IO[bytes]) -> str:
    """Return the class that a pickle begins with: that of its outermost object.

    The file is read to the end of the pickle.
    """
    found, strings, is_first = "", [""], True
    for operation, argument, _ in pickletools.genops(file):
        if not is_first:
            continue
        if operation.name in _STRINGS:
            strings.append(str(argument))
        elif operation.name == "GLOBAL":
            found = str(argument).replace(" ", ".")
        elif operation.name == "STACK_GLOBAL":
            found = ".".join(strings[-2:])
        is_first = operation.name in _SILENT
    return found
