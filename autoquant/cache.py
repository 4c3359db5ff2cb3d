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
    if not is_safe(cache_folder()):
        return make()
    path = cache_folder() / kind / key
    with suppress(OSError):
        found = path.read_bytes()
        digest, content = found[:_DIGEST_BYTES], found[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() == digest:
            return content
    content = make()
    with suppress(OSError, AutoquantError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, hashlib.sha256(content).digest() + content)
    return content
