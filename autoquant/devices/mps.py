"""The GPU of a Mac with Apple silicon, through Metal."""

from __future__ import annotations

import platform
import subprocess

import torch

from autoquant.devices.base import DEFAULT_CACHE_BYTES, Backend, library_versions
from autoquant.devices.memory import trim_memory
from autoquant.records import Device


class MpsBackend(Backend):
    """The GPU of a Mac. It shares the host's memory."""

    type = "mps"
    copy_bytes = 256 << 20
    product_side = 2048

    @classmethod
    def count(cls) -> int:
        return int(torch.backends.mps.is_available())

    @classmethod
    def missing_reason(cls) -> str:
        return (
            "PyTorch sees no mps device here: use --device cpu, or run on a Mac with Apple silicon"
        )

    def fingerprint(self) -> Device:
        versions = {**library_versions(), "macos": platform.mac_ver()[0]}
        if self.compile_failure() is not None:
            versions["compiler"] = "none"
        memory_gb = int(_system("hw.memsize") or 0) >> 30
        return Device(
            type=self.type,
            name=f"{_system('machdep.cpu.brand_string')} ({memory_gb} GB)",
            capability="metal",
            threads=0,
            cache_bytes=DEFAULT_CACHE_BYTES,
            versions=versions,
        )

    def float16(self) -> torch.dtype:
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def trim_memory(self) -> None:
        torch.mps.empty_cache()
        trim_memory()


def _system(name: str) -> str:
    """Return what the system says of itself under this name."""
    return subprocess.run(
        ["sysctl", "-n", name], capture_output=True, text=True, check=True
    ).stdout.strip()
