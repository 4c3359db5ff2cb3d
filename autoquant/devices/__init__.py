"""Devices: one file for each kind, and `backend`, which finds the one of a device.

A new kind of device is a new file with a subclass of `Backend`, and its entry in `BACKENDS`.
"""

from __future__ import annotations

import torch

from autoquant.devices.base import Backend, Division
from autoquant.devices.cpu import CpuBackend
from autoquant.devices.cuda import CudaBackend
from autoquant.devices.mps import MpsBackend
from autoquant.errors import DeviceError

__all__ = ["BACKENDS", "Backend", "Division", "backend"]

BACKENDS: tuple[type[Backend], ...] = (CudaBackend, MpsBackend, CpuBackend)
"""Every kind of device, the one that `--device auto` prefers first."""


def backend(device: str | torch.device) -> Backend:
    """Return the backend of a device, such as `cuda:1`.

    Raises:
        DeviceError: There is no such kind of device.
    """
    kind = str(device).partition(":")[0]
    for candidate in BACKENDS:
        if candidate.type == kind:
            return candidate(str(device))
    known = ", ".join(candidate.type for candidate in BACKENDS)
    raise DeviceError(f"{kind} devices are not supported: use one of {known}")
