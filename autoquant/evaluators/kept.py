"""Tensors that are made once: kept on disk, or held in memory."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

_COMPLETE = b"\1"
_HELD_SHARE = 1 / 8


class KeptTensor:
    """A tensor that is made once, in a temporary file without a name.

    Forked processes share the file, which disappears with the last of them.

    Args:
        most_bytes: A larger tensor is made again each time, as is one that does not fit the disk.
    """

    def __init__(self, most_bytes: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object
        self._most_bytes = most_bytes

    def is_kept(self) -> bool:
        """Check whether the tensor is in the file."""
        return os.pread(self._file.fileno(), 1, 0) == _COMPLETE

    def get(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the tensor of the first call of `make`."""
        number = self._file.fileno()
        if self.is_kept():
            kept: torch.Tensor = pickle.loads(_rest_of_file(number))
            return kept
        tensor = make()
        if tensor.nbytes <= self._most_bytes:
            # Pickling a larger one first would take longer on a GPU than making it again.
            self.keep(tensor, self._most_bytes)
        return tensor

    def keep(self, tensor: torch.Tensor, most_bytes: int = sys.maxsize) -> None:
        """Keep the tensor, unless it takes more bytes in the file or does not fit the disk."""
        number, data = self._file.fileno(), pickle.dumps(tensor)
        if len(data) <= most_bytes:
            with suppress(OSError):
                if os.pwrite(number, data, 1) == len(data):
                    os.pwrite(number, _COMPLETE, 0)


class HeldTensor:
    """A tensor that is made once, and stays in the memory where it is.

    Args:
        most_bytes: A larger tensor is kept on disk, or made again each time.
        on_disk: Where a larger one is kept.
    """

    def __init__(self, most_bytes: int, on_disk: KeptTensor | None = None) -> None:
        self._most_bytes, self._on_disk = most_bytes, on_disk
        self._tensor: torch.Tensor | None = None

    def get(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the tensor of the first call of `make`."""
        if self._tensor is not None:
            return self._tensor
        disk = self._on_disk
        on_disk = disk is not None and disk.is_kept()
        tensor = disk.get(make) if disk is not None and on_disk else make()
        if tensor.nbytes <= self._most_bytes:
            self._tensor = tensor
        elif disk is not None and not on_disk:
            disk.get(lambda: tensor)
        return tensor


def held_tensors(files: Sequence[KeptTensor | None], room_bytes: int) -> list[HeldTensor]:
    """Return a tensor for each file, in an eighth of the free memory as far as that goes.

    All are of one size: the first so many are held as fit together.
    """
    return [
        HeldTensor(int(_HELD_SHARE * room_bytes) // count, file)
        for count, file in enumerate(files, start=1)
    ]


def _rest_of_file(number: int) -> bytearray:
    """Return what lies behind the first byte. A single read gives 2 GiB at most."""
    data, size = bytearray(), os.fstat(number).st_size
    while len(data) < size - 1:
        data += os.pread(number, size - 1 - len(data), 1 + len(data))
    return data
