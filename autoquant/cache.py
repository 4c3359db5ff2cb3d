"""A cache on disk for what takes time to make and can be made again."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from autoquant.errors import AutoquantError
from autoquant.files import is_writable, write_file

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Return `$AUTOQUANT_CACHE`, or `autoquant` in the user's cache folder."""
    chosen = os.environ.get("AUTOQUANT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoquant"


def unusable() -> str | None:
    """Return why nothing can be kept in the cache folder, or None."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot make the cache folder {folder}: {error.strerror or error}"
    return None if is_writable(folder) else f"cannot write into the cache folder {folder}"


def is_safe(folder: Path) -> bool:
    """Check that a folder whose content is run is not open to everyone, nor another user's.

    A folder that is not there yet will be the user's own. Root is trusted, and trusts.
    """
    try:
        status = folder.stat()
    except OSError:
        return True
    user = os.geteuid()
    return not status.st_mode & stat.S_IWOTH and (user == 0 or status.st_uid in (user, 0))


def kept(kind: str, key: str, make: Callable[[], bytes]) -> bytes:
    """Return the result of `make`, read from the cache folder if it is there.

    A damaged file is made again. If the folder is not writable or not safe, every process makes its
    own.

    Args:
        kind: Name of the folder inside the cache folder.
        key: Name of the file. It must differ whenever `make` would return something else.
    """
    found = read_kept(kind, key)
    if found is not None:
        return found
    content = make()
    keep(kind, key, content)
    return content


def read_kept(kind: str, key: str, most_bytes: int | None = None) -> bytes | None:
    """Return what the cache folder has, or None if that is nothing, damaged, larger or not safe."""
    folder = cache_folder() / kind
    if not (is_safe(cache_folder()) and is_safe(folder)):
        return None
    with suppress(OSError), (folder / key).open("rb") as file:
        found = file.read(-1 if most_bytes is None else most_bytes + _DIGEST_BYTES)
        digest, content = found[:_DIGEST_BYTES], found[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() == digest:
            return content
    return None


def keep(kind: str, key: str, content: bytes) -> None:
    """Put a file into the cache folder, unless that is not writable or not safe."""
    folder = cache_folder() / kind
    if not (is_safe(cache_folder()) and is_safe(folder)):
        return
    with suppress(OSError, AutoquantError):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / key, hashlib.sha256(content).digest() + content)


def mark_used(kind: str, key: str) -> None:
    """Let a file be one of the last that `keep_newest` removes."""
    with suppress(OSError):
        os.utime(cache_folder() / kind / key)


def keep_newest(kind: str, most_bytes: int) -> None:
    """Remove the files of a kind that were used longest ago, until the others have few bytes."""
    total = 0
    with suppress(OSError):
        files = [path for path in (cache_folder() / kind).iterdir() if path.is_file()]
        facts = sorted(((path.stat(), path) for path in files), key=lambda each: -each[0].st_mtime)
        for status, path in facts:
            total += status.st_size
            if total > most_bytes:
                path.unlink(missing_ok=True)
