"""The folder for what can be made again but takes time, and files kept in it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Return the project's folder: `$AUTOQUANT_CACHE`, or `autoquant` under the user's cache folder."""
    chosen = os.environ.get("AUTOQUANT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoquant"


def kept(kind: str, key: str, make: Callable[[], bytes]) -> bytes:
    """Return what `make` gives, from the cache folder if a process has made it before.

    A file that is damaged is made again. A folder that cannot be written to costs the time of making it in each process.

    Args:
        kind: Name of the folder inside the cache folder.
        key: Tells everything that `make` depends on.
    """
    path = cache_folder() / kind / key
    with suppress(OSError):
        found = path.read_bytes()
        digest, content = found[:_DIGEST_BYTES], found[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() == digest:
            return content
    content = make()
    with suppress(OSError):
        _write(path, hashlib.sha256(content).digest() + content)
    return content


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, scratch = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
