"""An on-disk cache of tensors: cheaper than recomputing, and free of memory in between."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress

import torch

_COMPLETE = b"\1"


class KeptTensor:
    """A tensor that is made once, in a temporary file without a name.

    Forked processes share the file, which disappears with the last of them.

    Args:
        most_bytes: A larger tensor is made again each time, as is one that does not fit the disk.
    """

    def __init__(self, most_bytes: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object
        self._most_bytes = most_bytes

    def get(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the tensor of the first call of `make`."""
        number = self._file.fileno()
        if os.pread(number, 1, 0) == _COMPLETE:
            kept: torch.Tensor = pickle.loads(os.pread(number, self._most_bytes + 1, 1))
            return kept
        tensor = make()
        if tensor.nbytes > self._most_bytes:
            # Pickling it first would take longer on a GPU than making it again.
            return tensor
        data = pickle.dumps(tensor)
        if len(data) <= self._most_bytes:
            with suppress(OSError):
                if os.pwrite(number, data, 1) == len(data):
                    os.pwrite(number, _COMPLETE, 0)
        return tensor
