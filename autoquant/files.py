"""Files that are read within bounds, and are there as a whole or not at all.

Whatever ends the process or fills the disk, a file that is written here is the old or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from autoquant.errors import AutoquantError, DiskFullError, first_line

MOST_TEXT_BYTES = 64 * 2**20
"""The most that a file may have which is read as a whole. Those of models have a few."""

_UNFINISHED = ".unfinished"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_WORDS = (*map(os.strerror, _FULL), "database or disk is full")
_LITTLE_BYTES = 1 << 20
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?b|b)?", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size_bytes(text: str) -> int | None:
    """Read `2GiB`, `500MB` or `123456` as bytes; None if it is none of these, or not positive."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    unit = (match[2] or "b").lower().removesuffix("b")
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** _POWERS[unit.removesuffix("i")]) or None


def is_writable(path: Path) -> bool:
    """Check whether `path` may be written.

    Read-only permission bits count for root too, who could override them.
    """
    marked_read_only = not path.stat().st_mode & 0o222
    mounted_read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    return os.access(path, os.W_OK) and not marked_read_only and not mounted_read_only


def read_text(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, larger than `most_bytes`, or not UTF-8.
    """
    check_size(path, most_bytes)
    with path.open(encoding="utf-8") as file:
        return file.read(most_bytes)


def check_size(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> None:
    """Refuse a file that is too large to be read as a whole.

    Raises:
        OSError: There is no such file.
        ValueError: It is no regular file, or larger than `most_bytes`.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    if (size := path.stat().st_size) > most_bytes:
        raise ValueError(f"it has {size:,} bytes, more than {most_bytes:,}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, or not an object in JSON.
    """
    try:
        value = json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("its JSON is too deep") from error
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def check_stored(file: Path | BinaryIO) -> None:
    """Refuse a zip archive whose entries would take more memory than the file has.

    What torch writes is not compressed.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no archive, or an entry is compressed or larger than the file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            size = archive.fp.seek(0, os.SEEK_END) if archive.fp else 0
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"it is no whole archive: {error}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed, which those of torch.save are not")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries claim more bytes than the file has")


def write_file(path: Path, content: bytes) -> None:
    """Write a file, or replace it at once: a reader finds the old content or all of the new.

    It outlives a loss of power from now on.

    Raises:
        DiskFullError: There is no room; what was there is untouched.
        AutoquantError: The place is not writable; what was there is untouched.
    """
    try:
        _replace(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise_if_full(error, path)
        raise AutoquantError(f"cannot write {path}: {error.strerror or error}") from error


def _replace(target: Path, content: bytes) -> None:
    if target.exists() and not target.is_file():
        target.write_bytes(content)  # a terminal or a pipe cannot be replaced
        return
    with scratch_folder(target) as scratch:
        part = scratch / target.name
        part.write_bytes(content)
        if target.exists():
            shutil.copymode(target, part)
        move_whole(part, target)


def move_whole(part: Path, target: Path) -> None:
    """Rename a file or folder, with all that it holds on the disk before and after."""
    for path in (part, *part.rglob("*")):
        _sync(path)
    os.replace(part, target)
    _sync(target.parent)


def is_taken(target: Path) -> bool:
    """Check whether something is there that no folder can replace: all but an empty folder.

    A link is something, wherever it leads.
    """
    if target.is_dir() and not target.is_symlink():
        return any(target.iterdir())
    return target.is_symlink() or target.exists()


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside `target` to prepare it in. It is removed at the end.

    Those that killed processes left there for the same target are removed first.
    """
    _remove_leftovers(target)
    scratch, lock = _locked_folder(target)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let only one process at a time be inside for a folder; the others wait.

    On a file system without locks nobody waits.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def hold(path: Path) -> int | None:
    """Hold a file until this process ends or closes the number that is returned.

    Returns:
        None if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def raise_if_full(error: BaseException, place: Path | None = None) -> None:
    """Raise `DiskFullError` if a full disk caused `error`: that is no fact about a candidate.

    Args:
        place: What was written, if that is known.
    """
    full = next((each for each in _with_causes(error) if _says_full(each)), None)
    if full is None:
        return
    if isinstance(full, DiskFullError):
        raise full
    raise DiskFullError(
        f"the disk is full: no room for {place or _full_place(full)}; free some, and the same"
        " command goes on"
    ) from error


def _says_full(error: BaseException) -> bool:
    if isinstance(error, DiskFullError) or getattr(error, "errno", None) in _FULL:
        return True
    return any(words in str(error) for words in _FULL_WORDS)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # PyTorch's compiler wraps the error that matters.
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__


def _full_place(error: BaseException) -> str:
    """Return the file that did not fit, or else the folder of temporary files if that is full."""
    if name := getattr(error, "filename", None):
        return str(name)
    with suppress(OSError):
        folder = tempfile.gettempdir()
        if shutil.disk_usage(folder).free < _LITTLE_BYTES:
            return f"temporary files in {folder}"
    return f"a file ({first_line(error)})"


def _locked_folder(target: Path) -> tuple[Path, int]:
    """Make a scratch folder, which is locked as long as this process lives and has it open."""
    while True:
        made = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_UNFINISHED, dir=target.parent)
        lock = os.open(made, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: nobody removes anything there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(made):
            return Path(made), lock
        os.close(lock)  # another process took it for a leftover before it was locked


def _remove_leftovers(target: Path) -> None:
    """Remove scratch folders of this target that no living process has locked."""
    for name in target.parent.glob(f".{glob.escape(target.name)}.*{_UNFINISHED}"):
        with suppress(OSError):
            lock = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(name)
            finally:
                os.close(lock)


def _sync(path: Path) -> None:
    """Have a file or folder written to the disk itself."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


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
