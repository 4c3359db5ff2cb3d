"""Read files of bounded size, and check what can be written."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

MOST_TEXT_BYTES = 64 * 2**20
"""The most that a file may have which is read as a whole. Those of models have a few."""


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
