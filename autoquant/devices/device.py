"""The fingerprint of what runs the kernels, and whether PyTorch can compile for it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from autoquant.records import Device

_LIBRARIES = ("torchao", "triton", "gemlite", "mslk-cuda")
_DEFAULT_CACHE_BYTES = 32 << 20


def fingerprint(device: str) -> Device:
    """Describe `device` (`cpu`, `cuda`, `cuda:1`, `mps`) as it is now, thread count and library versions included."""
    kind = torch.device(device).type
    versions = {"torch": torch.__version__, **_installed(_LIBRARIES)}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions |= {"cuda": str(torch.version.cuda)}
        return Device(
            type=kind,
            name=properties.name,
            capability=f"sm_{properties.major}{properties.minor}",
            threads=0,
            cache_bytes=int(getattr(properties, "L2_cache_size", _DEFAULT_CACHE_BYTES)),
            versions=versions,
        )
    versions["compiler"] = _compiler_version() if compile_failure() is None else "none"
    return Device(
        type=kind,
        name=_cpu_name(),
        capability=_cpu_capability(),
        threads=torch.get_num_threads(),
        cache_bytes=_cpu_cache_bytes(),
        versions=versions,
    )


def compile_failure() -> str | None:
    """Return why `torch.compile` does not work on this CPU (no C++ compiler, say) and what to do, or None if it does."""
    if os.environ.get("AUTOQUANT_EAGER"):
        return "AUTOQUANT_EAGER is set; unset it to compile"
    return _failure_of_the_compiler()


@functools.cache
def _failure_of_the_compiler() -> str | None:
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(8))
    except Exception as error:  # noqa: BLE001 - any failure of the compiler means eager execution, with its reason
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return f"{reason}; install a C++ compiler (g++ or clang++) to compile"
    return None


def synchronize(device: str) -> None:
    """Wait until `device` has finished what it was given."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def release_memory() -> None:
    """Give memory that nobody uses any more back to the system."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it otherwise. Takes a moment only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _installed(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _compiler_version() -> str:
    compiler = os.environ.get("CXX", "g++")
    try:
        output = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return compiler
    return output.splitlines()[0].strip()


def _cpu_info() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _cpu_name() -> str:
    info = _cpu_info()
    model = info.get("model name", platform.processor() or platform.machine())
    family = "/".join(info[key] for key in ("cpu family", "model", "stepping") if key in info)
    return f"{model} ({family})" if family else model


def _cpu_capability() -> str:
    flags = set(_cpu_info().get("flags", "").split())
    extra = [flag for flag in ("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8") if flag in flags]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *extra])


def _cpu_cache_bytes() -> int:
    """Size of the last-level cache that core 0 sees."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * scale)
    return max(sizes, default=_DEFAULT_CACHE_BYTES)
