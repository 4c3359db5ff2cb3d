"""Whether the machine was doing something else while we measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

HIGHEST_OTHER_LOAD = 0.15
"""Above this share of the machine's cores, what was measured is not believed at once."""

_STAT = Path("/proc/stat")


class OtherLoad:
    """Watches how busy the cores are with anything but this process (other guests of a virtual machine included).

    Knows nothing where there is no `/proc/stat`: then the share is 0.
    """

    def __init__(self) -> None:
        self._wall = time.monotonic()
        self._busy = _busy_s()
        self._own = _own_s()

    def share(self) -> float:
        """Share of all cores' time that others used since this object was made, 0 to 1."""
        busy = _busy_s()
        wall = time.monotonic() - self._wall
        if busy is None or self._busy is None or wall <= 0:
            return 0.0
        others = (busy - self._busy) - (_own_s() - self._own)
        return max(0.0, others / (wall * (os.cpu_count() or 1)))


def _busy_s() -> float | None:
    try:
        fields = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
