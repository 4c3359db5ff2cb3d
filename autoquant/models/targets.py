"""Names of devices and dtypes, as users write them, to what torch calls them."""

from __future__ import annotations

import re

import torch

from autoquant.devices import BACKENDS, backend
from autoquant.errors import DeviceError, WorkloadError

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> str:
    """Turn `auto` or the name of a device, such as `cuda:1`, into a device that is there.

    `auto` is the first of `autoquant.devices.BACKENDS` that is there: cuda, then mps, then cpu.

    Raises:
        DeviceError: The name is unknown, or there is no such device here.
    """
    kinds = {each.type: each for each in BACKENDS}
    if name == "auto":
        return next(kind for kind, each in kinds.items() if each.count())
    match = re.fullmatch(r"(\w+?)(?::(\d+))?", name)
    if match is None or match[1] not in kinds:
        raise DeviceError(f"unknown device {name!r}: use auto, {', '.join(kinds)}, or one of several, as cuda:INDEX")
    kind, index = match[1], int(match[2] or 0)
    count = kinds[kind].count()
    if not count:
        raise DeviceError(kinds[kind].missing_reason())
    if index >= count:
        raise DeviceError(f"there is no {name}: PyTorch sees {count} {kind.upper()} device(s), numbered from 0")
    return name


def resolve_dtype(name: str, device: str, stored: torch.dtype) -> torch.dtype:
    """Turn a dtype name into the dtype to run in on `device` (a resolved name) for weights stored as `stored`.

    `auto` keeps the stored dtype; `fast16` is the better 16-bit float of the device: bfloat16 on the CPU, on CUDA from
    compute capability 8.0 and on MPS from macOS 14, float16 elsewhere.

    Raises:
        WorkloadError: The name is none of auto, fp32, bf16, fp16, fast16, float32, bfloat16, float16.
    """
    if name == "auto":
        return stored
    if name == "fast16":
        return backend(device).float16()
    if name not in _DTYPES:
        raise WorkloadError(f"unknown dtype {name!r}: use auto, fp32, bf16, fp16 or fast16")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Turn `torch.bfloat16` into `bfloat16`."""
    return str(dtype).removeprefix("torch.")
