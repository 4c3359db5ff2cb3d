"""Tensors that are needed again, kept on disk: to read one takes less time than to compute it, and no memory between."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress

import torch

_COMPLETE = b"\1"


class KeptTensor:
    """A tensor that is made once, in a temporary file without a name, which is gone with the last process that has it open.

    Processes forked from the one that made this object share the file.

    Args:
        most_bytes: A larger tensor is not kept, but made again each time; so is one that the disk has no room for.
    """

    def __init__(self, most_bytes: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object is there
        self._most_bytes = most_bytes

    def get(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives, or gave when it was called first."""
        number = self._file.fileno()
        if os.pread(number, 1, 0) == _COMPLETE:
            kept: torch.Tensor = pickle.loads(os.pread(number, self._most_bytes + 1, 1))
            return kept
        tensor = make()
        if (
            tensor.nbytes > self._most_bytes
        ):  # not even pickled: from a GPU that takes longer than to make it
            return tensor
        data = pickle.dumps(tensor)
        if len(data) <= self._most_bytes:
            with suppress(OSError):
                if os.pwrite(number, data, 1) == len(data):
                    os.pwrite(number, _COMPLETE, 0)
        return tensor
