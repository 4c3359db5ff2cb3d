"""Measure how busy other programs kept the machine, or its GPU, during a measurement."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

_STAT = Path("/proc/stat")
_YARDSTICK_BYTES = 256 << 20
_YARDSTICK_COPIES = 32


class Load(Protocol):
    """Watches what could disturb a measurement, since it was made."""

    def share(self) -> float:
        """Return the fraction of the machine's time that others used, 0 to 1."""
        ...


class OtherLoad:
    """Watches how busy other processes, or other guests of a virtual machine, keep the cores.

    These are the cores that this process may use. The share is 0 on systems without `/proc/stat`.
    """

    def __init__(self) -> None:
        self._cores = _own_cores()
        self._wall = time.monotonic()
        self._busy = _busy_s(self._cores)
        self._own = _own_s()

    def share(self) -> float:
        """Return the fraction of the cores' time that others used since then, 0 to 1."""
        busy = _busy_s(self._cores)
        wall = time.monotonic() - self._wall
        if busy is None or self._busy is None or wall <= 0:
            return 0.0
        others = (busy - self._busy) - (_own_s() - self._own)
        return max(0.0, others / (wall * len(self._cores)))


class GpuLoad:
    """Watches how much of a GPU's time others take, by a yardstick: copies of some milliseconds.

    Another process on the GPU gets slices of its time, some of which fall into the yardstick. The
    fastest run that this process ever saw counts as undisturbed.
    """

    _fastest_ms: dict[str, float] = {}  # noqa: RUF012 - shared on purpose, by device
    _buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # noqa: RUF012

    def __init__(self, device: str) -> None:
        self._device = device
        self._slowest_ms = self._run_ms()

    def share(self) -> float:
        """Return the fraction of the GPU's time that others used, now or at first, 0 to 1."""
        slowest = max(self._slowest_ms, self._run_ms())
        return 1 - self._fastest_ms[self._device] / slowest

    def _run_ms(self) -> float:
        """Return the middle of three runs: the work of others lasts, a hiccup does not."""
        runs = sorted(self._copy_ms() for _ in range(3))
        known = self._fastest_ms.get(self._device, runs[0])
        self._fastest_ms[self._device] = min(known, runs[0])
        return runs[1]

    def _copy_ms(self) -> float:
        source, target = self._tensors()
        with torch.cuda.device(self._device):
            start, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_YARDSTICK_COPIES):
                torch.neg(source, out=target)
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._device not in self._buffers:
            source = torch.rand(_YARDSTICK_BYTES // 4, device=self._device)
            self._buffers[self._device] = source, torch.empty_like(source)
            for _ in range(2):
                self._copy_ms()
        return self._buffers[self._device]


def _own_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _busy_s(cores: Sequence[int]) -> float | None:
    """Return the seconds that cores were busy since the system started, or None if unknown."""
    try:
        rows = [line.split() for line in _STAT.read_text().splitlines()]
        fields = {row[0]: [int(field) for field in row[1:9]] for row in rows if row[0][:3] == "cpu"}
    except (OSError, ValueError, IndexError):
        return None
    ticks = 0
    for core in cores:
        if (of_core := fields.get(f"cpu{core}")) is None:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = of_core
        ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
