"""All that may disturb a measurement: other programs, heat, a limit on CPU time, a sleep."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from autoquant.devices.load import Load

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
_SLEPT_S = 0.5
_HELD_BACK = 0.05
_HEAT = ("core_throttle_count", "package_throttle_count")


class Watch:
    """Watches from now on what could disturb a measurement.

    Args:
        load: Watches other programs on the device.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._started_s = time.monotonic()
        self._asleep_s = asleep_s()
        self._heat = throttles()
        self._held_back_s = held_back_s()

    def disturbance(self, highest_other_load: float) -> str:
        """Return what disturbed the measurement since then, or an empty string.

        It is a clause, such as "others used 40% of the machine".

        Args:
            highest_other_load: Up to this fraction of the machine's time, others do not disturb.
        """
        share = self._load.share()
        if share > highest_other_load:
            return f"others used {share:.0%} of the machine"
        slept_s = asleep_s() - self._asleep_s
        if slept_s > _SLEPT_S:
            return f"the machine slept for {slept_s:.0f} s"
        if throttles() > self._heat:
            return "heat slowed the CPU down"
        waited_s = held_back_s() - self._held_back_s
        if waited_s > _HELD_BACK * (time.monotonic() - self._started_s):
            return f"the limit on CPU time held its threads back for {waited_s:.2g} s"
        return ""


def asleep_s() -> float:
    """Return how long the machine has been asleep since it was started; 0 if unknown."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


def throttles() -> int:
    """Return how often heat has slowed a CPU down; 0 if unknown."""
    files = (path for name in _HEAT for path in _CPUS.glob(f"cpu[0-9]*/thermal_throttle/{name}"))
    return sum(_number(path) for path in files)


def held_back_s() -> float:
    """Return how long a control group's limit on CPU time has stopped its threads."""
    return _statistics(_CGROUP / "cpu.stat").get("throttled_usec", 0) / 1e6


def cpu_quota() -> float | None:
    """Return how many CPUs' time the control group of this process may use, or None for all."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _statistics(path: Path) -> Mapping[str, int]:
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
        return {line[0]: int(line[1]) for line in lines}
    except (OSError, ValueError, IndexError):
        return {}
