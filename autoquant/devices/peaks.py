"""The most memory that work takes: on the device, and on the host with the processes it starts."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from autoquant.devices import backend
from autoquant.devices.memory import own_bytes

_LOOK_S = 0.2
_PROC = Path("/proc")


class PeakMemory:
    """Looks at memory five times a second, and knows the most since it was last asked.

    On the host, it is what this process has and what the largest of those below it has, without
    pages of files. A forked process is counted with what it shares with its parent. On a GPU, it is
    what PyTorch allocated in this process.

    Args:
        device: Where the work computes.
    """

    def __init__(self, device: str) -> None:
        self._place = backend(device)
        self._most_bytes = 0
        self._looking = threading.Lock()  # what was seen before is not kept afterwards
        self._ended = threading.Event()
        self._place.most_bytes()
        self._thread = threading.Thread(target=self._watch, name="peak memory", daemon=True)
        self._thread.start()

    def take(self) -> Mapping[str, int]:
        """Return the most bytes since the last call, of `host` and `device`, where known."""
        self._look()
        with self._looking:
            most_bytes, self._most_bytes = self._most_bytes, 0
        found = {"host": most_bytes, "device": self._place.most_bytes()}
        return {name: size for name, size in found.items() if size}

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self._look()

    def _look(self) -> None:
        with self._looking:
            me = os.getpid()
            others = [own_bytes(process) for process in _below(me)]
            self._most_bytes = max(self._most_bytes, own_bytes(me) + max(others, default=0))


def _below(process: int) -> list[int]:
    """Return the processes that a process started, and those that these started."""
    try:
        text = (_PROC / str(process) / "task" / str(process) / "children").read_text()
    except OSError:
        return []
    children = [int(word) for word in text.split()]
    return children + [each for child in children for each in _below(child)]
