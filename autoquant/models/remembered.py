"""Remember the digests of tensors in files for as long as the files do not change.

A file is known by its device, inode, length, and the times of its last modification and of its last
change, not by its path. The last of these no program can set: the kernel notes when content, or
anything else about the file, changes. So other content, or another file in its place, is hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from autoquant.cache import keep, keep_newest, mark_used, read_kept
from autoquant.models.content import DIGEST_VERSION, content_hash, tensor_digest
from autoquant.models.targets import dtype_name

KIND = "digests"
"""Name of the folder in the cache folder."""

_MOST_BYTES = 64 * 2**20
_MOST_BYTES_EACH = 16 * 2**20
_SETTLED_NS = 2_000_000_000  # clocks of file systems tick as slowly as this

# Of each file: device, inode, bytes, and the times in ns of its modification and change.
_Facts: TypeAlias = tuple[tuple[int, int, int, int, int], ...]


class FileDigests:
    """The digests of the tensors in some files, remembered from command to command.

    Make it before the files are read. Only what every reader makes of the files in the same way may
    be watched: not what code in them made.

    Args:
        paths: Files of one model; none to remember nothing.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._made_ns = time.time_ns()
        self._facts = _facts(self._paths)
        self._known: dict[str, str] = {} if self._facts is None else _read(self._facts)
        self._new: dict[str, str] = {}
        self._labels: dict[int, str] = {}
        self._watched: list[tuple[str, torch.Tensor]] = []

    def watch(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Note the name that each tensor has in the files, and return all of them.

        What is known is forgotten if other files have been opened since.
        """
        found = list(tensors)
        self._labels = {id(tensor): _label(name, tensor) for name, tensor in found}
        self._watched = found  # keeps the ids theirs
        ambiguous = len({name for name, _ in found}) < len(found)  # two files have one name
        if ambiguous or _facts(self._paths) != self._facts:
            self._facts, self._known = None, {}
        return found

    def content_hash(
        self, tensors: Iterable[tuple[str, torch.Tensor]], architecture: Mapping[str, Any] | str
    ) -> str:
        """Do as `content.content_hash`, but read only tensors whose digests are not known.

        The tensors may have other names here than in the files.
        """
        digest = content_hash(tensors, architecture, self._digest)
        if self._facts is not None and self._new and self._may_keep(self._facts):
            _keep(self._facts, self._known | self._new)
        return digest

    def _digest(self, name: str, tensor: torch.Tensor) -> str:
        label = self._labels.get(id(tensor))
        if label is None:
            return tensor_digest(name, tensor)
        if label in self._known:
            return self._known[label]
        digest = tensor_digest(name, tensor)
        self._new[label] = digest
        return digest

    def _may_keep(self, facts: _Facts) -> bool:
        """Check that nothing was written while the files were read, nor just before.

        What is written within one tick of a file system's clock has one time.
        """
        last_ns = max(max(modified_ns, changed_ns) for *_, modified_ns, changed_ns in facts)
        return last_ns < self._made_ns - _SETTLED_NS and _facts(self._paths) == facts


def _label(name: str, tensor: torch.Tensor) -> str:
    return f"{name}:{dtype_name(tensor.dtype)}:{tuple(tensor.shape)}"


def _facts(paths: Sequence[Path]) -> _Facts | None:
    """Return what files are known by, or None if one of them cannot be."""
    found = []
    try:
        for path in paths:
            with path.open("rb") as file:  # a network file system asks its server then
                status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return None
            times_ns = status.st_mtime_ns, status.st_ctime_ns
            found.append((status.st_dev, status.st_ino, status.st_size, *times_ns))
    except OSError:
        return None
    return tuple(found) or None


def _key(facts: _Facts) -> str:
    return hashlib.sha256(json.dumps([DIGEST_VERSION, facts]).encode()).hexdigest()


def _read(facts: _Facts) -> dict[str, str]:
    content = read_kept(KIND, _key(facts), _MOST_BYTES_EACH)
    if content is None:
        return {}
    try:
        entry = json.loads(content)
        if tuple(map(tuple, entry["files"])) != facts:
            return {}
        digests = {str(label): str(digest) for label, digest in entry["digests"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    mark_used(KIND, _key(facts))
    return digests


def _keep(facts: _Facts, digests: Mapping[str, str]) -> None:
    content = json.dumps({"files": facts, "digests": digests}).encode()
    if len(content) <= _MOST_BYTES_EACH:
        keep(KIND, _key(facts), content)
        keep_newest(KIND, _MOST_BYTES)
