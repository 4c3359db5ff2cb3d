"""The CPU."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from autoquant.devices.base import DEFAULT_CACHE_BYTES, Backend, Place, library_versions
from autoquant.devices.recorded_steps import RecordedStep
from autoquant.devices.watch import cpu_quota
from autoquant.records import Device

_CPUS = Path("/sys/devices/system/cpu")


class CpuBackend(Backend):
    """The CPU, with all its threads."""

    type = "cpu"
    divisions = ("parts", "regions", "whole")
    forks = True
    replays_steps = True
    repeats = True
    profiler_activities = (ProfilerActivity.CPU,)
    arithmetic = ("bfloat16", "float32", "int8")
    # Compiled code would check its inputs' sizes at every call, 1 ms in a step of 20.
    compiler_settings = {"size_asserts": False, "alignment_asserts": False}  # noqa: RUF012
    # Between two kernels compiled Python takes 10 to 20 us, and C++ one or two.
    recorded_settings = {"cpp_wrapper": True}  # noqa: RUF012

    @classmethod
    def missing_reason(cls) -> str:
        return "PyTorch always has a CPU"

    def places(self) -> list[Place]:
        """Return groups of cores, each with one for every thread that PyTorch computes with."""
        threads = torch.get_num_threads()
        if not hasattr(os, "sched_getaffinity"):
            return super().places()
        cores = sorted(os.sched_getaffinity(0))
        usable = int(min(len(cores), cpu_quota() or len(cores)))
        firsts = range(0, usable - threads + 1, threads)
        places = [Place(self.device, cores=tuple(cores[at : at + threads])) for at in firsts]
        return places if len(places) > 1 else super().places()

    def fingerprint(self) -> Device:
        compiler = _compiler_version() if self.compile_failure() is None else "none"
        return Device(
            type=self.type,
            name=_name(),
            capability=_capability(),
            threads=torch.get_num_threads(),
            cache_bytes=_cache_bytes(),
            versions={**library_versions(), "compiler": compiler, **clock_limits()},
        )

    def about(self) -> Mapping[str, str]:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        cores = f"{usable or os.cpu_count()} of {os.cpu_count()} cores usable"
        limits = [f"{name} {text}" for name, text in {**clock_limits(), **_governor()}.items()]
        threads = torch.get_num_threads()
        computing = "1 thread" if threads == 1 else f"{threads} threads"
        words = [cores, computing, _capability(), *limits]
        return {"device": f"{_name()}; {', '.join(words)}"}

    def concerns(self) -> Mapping[str, str]:
        found = {}
        quota, threads = cpu_quota(), torch.get_num_threads()
        if quota is not None and threads > quota:
            what = f"{threads} threads share {quota:g} CPUs' time (a limit of the container)"
            found[what] = f"set OMP_NUM_THREADS={max(1, int(quota))}, or raise the limit"
        if limit := clock_limits().get("clock limit"):
            found[f"the clock is limited to {limit}"] = (
                "raise scaling_max_freq, if the model will run without the limit; timings are kept"
                " apart from those without it"
            )
        return found

    def synchronize(self) -> None:
        """Do nothing: a call returns when it is done."""

    def graphed(
        self,
        step: Callable[..., torch.Tensor],
        state: Callable[[], Sequence[torch.Tensor]],
        pool: Any = None,
    ) -> Callable[..., torch.Tensor]:
        return RecordedStep(step, state)


def clock_limits() -> dict[str, str]:
    """Return what keeps the CPU from its full speed, by name; empty if nothing is known to."""
    found = {}
    if (quota := cpu_quota()) is not None:
        found["CPU quota"] = f"{quota:g}"
    most, allowed = (_khz(name) for name in ("cpuinfo_max_freq", "scaling_max_freq"))
    if most and allowed and allowed < most:
        found["clock limit"] = f"{allowed / 1e6:.2g} of {most / 1e6:.2g} GHz"
    if _text(_CPUS / "intel_pstate/no_turbo") == "1" or _text(_CPUS / "cpufreq/boost") == "0":
        found["turbo"] = "off"
    return found


def _governor() -> dict[str, str]:
    governor = _text(_CPUS / "cpu0/cpufreq/scaling_governor")
    return {"governor": governor} if governor else {}


def _khz(name: str) -> int:
    text = _text(_CPUS / "cpu0/cpufreq" / name)
    return int(text) if text.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


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
    split = [line.partition(":") for line in lines]
    return {key.strip(): value.strip() for key, _, value in split}


def _name() -> str:
    info = _info()
    model = info.get("model name", platform.processor() or platform.machine())
    family = "/".join(info[key] for key in ("cpu family", "model", "stepping") if key in info)
    return f"{model} ({family})" if family else model


def instructions() -> str:
    """Return what tells CPUs apart that run the same machine code from those that may not."""
    info = _info()
    return info.get("flags") or info.get("Features") or f"{platform.machine()} {_name()}"


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
