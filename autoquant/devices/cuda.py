"""GPUs of NVIDIA."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity

from autoquant.devices.base import (
    DEFAULT_CACHE_BYTES,
    Backend,
    Event,
    Paces,
    Place,
    library_versions,
)
from autoquant.devices.clocks import Call, Clock
from autoquant.devices.cuda_graphs import MOST_CALLS, GraphClock, GraphedStep
from autoquant.devices.effort import TimingEffort
from autoquant.devices.load import GpuLoad, Load
from autoquant.devices.memory import memory_limit, trim_memory
from autoquant.devices.uploads import in_pieces, is_plain
from autoquant.records import Device

_ASKED = (
    "driver_version",
    "power.limit",
    "power.default_limit",
    "clocks.sm",
    "clocks.max.sm",
    "temperature.gpu",
    "utilization.gpu",
)
_LONGEST_S = 10
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class CudaBackend(Backend):
    """A GPU of NVIDIA."""

    type = "cuda"
    divisions = ("parts", "regions", "whole")
    # Merges small independent kernels, such as those that rotate queries and keys.
    compiler_settings = {"combo_kernels": True}  # noqa: RUF012
    graphs = True
    most_copies = MOST_CALLS
    prepares = True
    replays_steps = True
    settles_routes = True
    fuses = True
    scoring_precision = "high"
    judges_long = True
    gpus = 1
    profiler_activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
    upload_threads = 4
    # Of searches on an H200 with 16 cores, see studies/search_cost.
    paces = Paces(
        timing_s=0.3,
        score_s=0.55,
        proof_s=7.0,
        proof_linear_s=0.04,
        deliver_s=35.0,
        deliver_linear_s=0.08,
    )
    arithmetic = ("bfloat16", "float16", "float32", "int8", "float8")
    copy_bytes = 1 << 30
    product_side = 8192

    @classmethod
    def count(cls) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    @classmethod
    def missing_reason(cls) -> str:
        return (
            "PyTorch sees no CUDA device here: use --device cpu, or check the driver and install"
            " PyTorch built for CUDA"
        )

    def places(self) -> list[Place]:
        """Return the GPUs of this kind, each as the only one that a process sees."""
        own = torch.device(self.device).index or 0
        key = self.fingerprint().key
        others = [index for index in range(self.count()) if index != own]
        alike = [i for i in others if CudaBackend(f"{self.type}:{i}").fingerprint().key == key]
        visible = os.environ.get(_VISIBLE, "").split(",")
        names = visible if visible[0] else [str(index) for index in range(self.count())]
        return [Place(self.type, {_VISIBLE: names[index].strip()}) for index in (own, *alike)]

    def fingerprint(self) -> Device:
        properties = torch.cuda.get_device_properties(self.device)
        return Device(
            type=self.type,
            name=properties.name,
            capability=f"sm_{properties.major}{properties.minor}",
            threads=0,
            cache_bytes=int(getattr(properties, "L2_cache_size", DEFAULT_CACHE_BYTES)),
            versions={**library_versions(), "cuda": str(torch.version.cuda), **self._limits()},
        )

    def about(self) -> Mapping[str, str]:
        properties = torch.cuda.get_device_properties(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        capability = f"sm_{properties.major}{properties.minor}"
        words = [f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free", capability]
        for name, value in self._nvidia_smi().items():
            words.append(f"{name.replace('_', ' ').replace('.', ' ')} {value}")
        return {"device": f"{properties.name}; {', '.join(words)}"}

    def concerns(self) -> Mapping[str, str]:
        found = {}
        if limit := self._limits().get("power limit"):
            found[f"the power is limited to {limit}"] = (
                "raise it with `nvidia-smi -pl`, if the model will run without the limit; timings"
                " are kept apart from those without it"
            )
        if not self._nvidia_smi():
            found["nvidia-smi does not report the GPU's driver and limits"] = (
                "install it; until then timings with another driver count as this one's"
            )
        return found

    def _limits(self) -> dict[str, str]:
        """Return the driver, and a power limit that is not the usual one, as far as known."""
        says = self._nvidia_smi()
        if not says:
            return {}
        found = {"driver": says["driver_version"]}
        if says["power.limit"] != says["power.default_limit"]:
            found["power limit"] = says["power.limit"]
        return found

    def _nvidia_smi(self) -> Mapping[str, str]:
        uuid = getattr(torch.cuda.get_device_properties(self.device), "uuid", None)
        return _nvidia_smi(str(uuid))

    def float16(self) -> torch.dtype:
        native = torch.cuda.get_device_capability(self.device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16

    def converts_float8(self) -> bool:
        return torch.cuda.get_device_capability(self.device) >= (8, 9)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def clock(self, call: Call, positions: int, linears: int, effort: TimingEffort) -> Clock:
        return GraphClock(call, positions, self.device)

    def time_s(self, call: Callable[[], object]) -> float:
        """Return the seconds that one call takes by the GPU's own clock."""
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

    def watch_load(self) -> Load:
        return GpuLoad(self.device)

    def event(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cast(Event, event)

    def free_bytes(self) -> int:
        free, limit = torch.cuda.mem_get_info(self.device)[0], memory_limit()
        if limit is None:
            return free
        return max(0, min(free, limit - torch.cuda.memory_reserved(self.device)))

    def room_bytes(self) -> int:
        """Return what is free, with what PyTorch keeps of freed tensors."""
        allocated, kept = torch.cuda.memory_allocated, torch.cuda.memory_reserved
        return self.free_bytes() + kept(self.device) - allocated(self.device)

    def keep_to_limit(self) -> None:
        if (limit := memory_limit()) is not None:
            total = torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), self.device)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy through pinned memory: the driver would wait for each page of a mapped file."""
        if not is_plain(tensor):
            return super().upload(tensor)
        with torch.cuda.device(self.device):  # memory is pinned by this GPU's context
            return in_pieces(tensor, self.device, torch.Tensor.pin_memory)

    def trim_memory(self) -> None:
        trim_memory()
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before_bytes = torch.cuda.memory_allocated(self.device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self._before_bytes

    def most_bytes(self) -> int:
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return 0
        most = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return most

    def compile_failure(self) -> str | None:
        """Return None: Triton brings its own compiler."""
        return None

    def warm_compiler(self) -> None:
        """Start the processes that compile kernels. Without them this process does it at first."""
        if not self.prepares:
            return
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.use_process_pool()  # type: ignore[no-untyped-call]

    def graph_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def graphed(
        self,
        step: Callable[..., torch.Tensor],
        state: Callable[[], Sequence[torch.Tensor]],
        pool: Any = None,
    ) -> Callable[..., torch.Tensor]:
        return GraphedStep(step, state, pool)


@functools.cache
def _nvidia_smi(uuid: str) -> Mapping[str, str]:
    """Return what nvidia-smi says of a GPU; empty if it does not. Asked once a process."""
    query = f"--query-gpu={','.join(_ASKED)}"
    command = ["nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader"]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_LONGEST_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in output.strip().split(",")]
    return dict(zip(_ASKED, values, strict=True)) if len(values) == len(_ASKED) else {}
