"""Read names of devices and dtypes as users write them."""

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
        raise DeviceError(
            f"unknown device {name!r}: use auto, {', '.join(kinds)}, or one of several, as"
            " cuda:INDEX"
        )
    kind, index = match[1], int(match[2] or 0)
    count = kinds[kind].count()
    if not count:
        raise DeviceError(kinds[kind].missing_reason())
    if index >= count:
        raise DeviceError(
            f"there is no {name}: PyTorch sees {count} {kind.upper()} device(s), numbered from 0"
        )
    return name


def resolve_dtype(name: str, device: str, stored: torch.dtype) -> torch.dtype:
    """Return the dtype to run in.

    Args:
        name: `auto` keeps the stored dtype. `fast16` is the better 16-bit float of the device:
            bfloat16 on the CPU, on CUDA from compute capability 8.0 and on MPS from macOS 14, else
            float16. Others are fp32, bf16, fp16, float32, bfloat16 and float16.
        device: As `resolve_device` returns it.
        stored: The dtype of the stored weights.

    Raises:
        WorkloadError: The name is unknown.
    """
    if name == "auto":
        return stored
    if name == "fast16":
        return backend(device).float16()
    if name not in _DTYPES:
        raise WorkloadError(f"unknown dtype {name!r}: use auto, fp32, bf16, fp16 or fast16")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype without its module: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
