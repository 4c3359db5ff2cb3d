"""Read names of devices and dtypes as users write them."""

from __future__ import annotations

import re

import torch

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
    """Return the device of a name: `auto`, `cpu`, `mps`, `cuda` or `cuda:INDEX`.

    `auto` prefers cuda, then mps.

    Raises:
        DeviceError: The name is unknown, or there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    match = re.fullmatch(r"(cpu|mps|cuda)(?::(\d+))?", name)
    if match is None:
        raise DeviceError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:INDEX or mps")
    kind, index = match[1], int(match[2] or 0)
    if kind == "cuda":
        _check_cuda(name, index)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            "PyTorch sees no mps device here: use --device cpu, or run on a Mac with Apple silicon"
        )
    if kind != "cuda" and index > 0:
        raise DeviceError(f"there is only one {kind} device: use --device {kind} instead of {name}")
    return name


def _check_cuda(name: str, index: int) -> None:
    if not torch.cuda.is_available():
        raise DeviceError(
            "PyTorch sees no CUDA device here: use --device cpu, or check the driver and install"
            " PyTorch built for CUDA"
        )
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(
            f"there is no {name}: PyTorch sees {count} CUDA device(s), numbered from 0"
        )


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
        return _fast16(device)
    if name not in _DTYPES:
        raise WorkloadError(f"unknown dtype {name!r}: use auto, fp32, bf16, fp16 or fast16")
    return _DTYPES[name]


def _fast16(device: str) -> torch.dtype:
    if device.startswith("cuda"):
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.startswith("mps"):
        native = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        native = True
    return torch.bfloat16 if native else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype without its module: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
