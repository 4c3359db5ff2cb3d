"""Checks of files that several parts of the package need."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePath


def is_writable(path: Path) -> bool:
    """Check whether `path` may be written.

    Read-only permission bits count for root too, who could override them.
    """
    marked_read_only = not path.stat().st_mode & 0o222
    mounted_read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    return os.access(path, os.W_OK) and not marked_read_only and not mounted_read_only


def stays_inside(name: str) -> bool:
    """Check that a name, read from a file, leads to no place outside that file's folder.

    Links are followed wherever they lead: no file makes them.
    """
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def hash_files(paths: Iterable[Path]) -> str:
    """Return a SHA-256 of the contents of files and of their names, in this order."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256")
        total.update(f"{path.name}\0{content.hexdigest()}\0".encode())
    return total.hexdigest()
