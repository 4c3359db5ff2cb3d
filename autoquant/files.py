"""Checks of files that several parts of the package need."""

from __future__ import annotations

import os
from pathlib import Path


def is_writable(path: Path) -> bool:
    """Check whether `path` may be written.

    Read-only permission bits count for root too, who could override them.
    """
    marked_read_only = not path.stat().st_mode & 0o222
    mounted_read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    return os.access(path, os.W_OK) and not marked_read_only and not mounted_read_only
