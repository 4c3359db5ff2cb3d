"""The CPU."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from autoquant.devices.base import DEFAULT_CACHE_BYTES, Backend, library_versions
from autoquant.records import Device


class CpuBackend(Backend):
    """The CPU, with all its threads."""

    type = "cpu"
    forks = True
    replays_steps = True
    repeats = True
    profiler_activities = (ProfilerActivity.CPU,)
    arithmetic = ("bfloat16", "float32", "int8")

    @classmethod
    def missing_reason(cls) -> str:
        return "PyTorch always has a CPU"

    def fingerprint(self) -> Device:
        compiler = _compiler_version() if self.compile_failure() is None else "none"
        return Device(
            type=self.type,
            name=_name(),
            capability=_capability(),
            threads=torch.get_num_threads(),
            cache_bytes=_cache_bytes(),
            versions={**library_versions(), "compiler": compiler},
        )

    def synchronize(self) -> None:
        """Do nothing: a call returns when it is done."""


def _compiler_version() -> str:
    compiler = os.environ.get("CXX", "g++")
    try:
        output = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return compiler
    return output.splitlines()[0].strip()


def _info() -> dict[str, str]:
    """Return what the kernel says of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _name() -> str:
    info = _info()
    model = info.get("model name", platform.processor() or platform.machine())
    family = "/".join(info[key] for key in ("cpu family", "model", "stepping") if key in info)
    return f"{model} ({family})" if family else model


def _capability() -> str:
    flags = set(_info().get("flags", "").split())
    wanted = ("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
    extra = [flag for flag in wanted if flag in flags]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *extra])


def _cache_bytes() -> int:
    """Return the size of the last-level cache that core 0 sees."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * scale)
    return max(sizes, default=DEFAULT_CACHE_BYTES)
