"""The interface of a device: everything that the project needs from it."""

from __future__ import annotations

import functools
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch.profiler import ProfilerActivity

from autoquant.devices.clocks import Call, Clock, HostClock
from autoquant.devices.effort import TimingEffort
from autoquant.devices.load import Load, OtherLoad
from autoquant.devices.memory import available_bytes, memory_limit, trim_memory
from autoquant.files import raise_if_full
from autoquant.records import Device

Division = Literal["parts", "regions", "whole"]
"""The pieces that a model is compiled in.

One by one (`parts`, see `autoquant.runtime.parts`), all at once with nested regions for blocks, or
all at once (`whole`).
"""

DEFAULT_CACHE_BYTES = 32 << 20
ENTRY_POINT_GROUP = "autoquant.candidates"
_LIBRARIES = ("torchao", "triton", "gemlite", "mslk-cuda")


class Event(Protocol):
    """A place in the work that a device was given."""

    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Paces:
    """Seconds that parts of a search take, roughly: a guess until one has ended on the device.

    Attributes:
        timing_s: One timing of a linear, with its preparation.
        score_s: Scoring a billion weights in one format.
        proof_s, proof_linear_s: The proof of a plan, and what each linear of the model adds.
        deliver_s, deliver_linear_s: The same of running a plan as its user will.
    """

    timing_s: float
    score_s: float
    proof_s: float
    proof_linear_s: float
    deliver_s: float
    deliver_linear_s: float


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a host that a worker process has for itself.

    Attributes:
        device: The torch device that it is in that process.
        environment: Variables that are set before the process starts.
        cores: The cores that the process may use; empty for all.
    """

    device: str
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()


class Backend(ABC):
    """One device, and all that the project has to know about its kind.

    A new kind of device is a new file with a subclass, and its entry in
    `autoquant.devices.BACKENDS`. The defaults suit a device that shares the host's memory, is timed
    by the host's clock and compiles through PyTorch.

    Args:
        device: As torch names it, such as `cuda:1`.

    Attributes:
        type: PyTorch's name of the kind.
        divisions: Ways to compile a whole model, the quickest to be ready first.
        compiler_settings: Settings of Inductor.
        recorded_settings: Further ones, for the parts of a model in a step that is recorded.
        graphs: A step can be captured as a graph, whose replay starts all its kernels at once.
        most_copies: Most copies of a weight that a timing rotates through; None for all that fit.
        prepares: Candidates are compiled and tuned ahead, by parallel processes, and kept on disk.
        forks: A process that has a model for this device in memory can be forked.
        replays_steps: `generate` may run compiled steps.
        settles_routes: A search measures between its own m where kernels overtake one another.
        repeats: A kernel gives the same bits each time, unless it says otherwise.
        fuses: Linears that read the same input are usually faster as one, and tried so by default.
        scoring_precision: How precisely layers' losses are scored, as PyTorch names it.
        gpus: How many GPUs it is where a scheduler counts them.
        judges_long: Whole models run so fast that quality is judged on a longer text.
        profiler_activities: What PyTorch's profiler must record to see the kernels; empty if it
            cannot.
        upload_threads: How many threads at once copy tensors to the device.
        paces: What a search takes, roughly.
        arithmetic: What a roofline's products are measured in.
        copy_bytes, product_side: What a roofline is measured with: bytes copied, and rows of a
            square matrix.
    """

    type: ClassVar[str]
    divisions: ClassVar[Sequence[Division]] = ("regions", "whole")
    compiler_settings: ClassVar[Mapping[str, Any]] = {}
    recorded_settings: ClassVar[Mapping[str, Any]] = {}
    graphs: ClassVar[bool] = False
    most_copies: ClassVar[int | None] = None
    prepares: ClassVar[bool] = False
    forks: ClassVar[bool] = False
    replays_steps: ClassVar[bool] = False
    settles_routes: ClassVar[bool] = False
    repeats: ClassVar[bool] = False
    fuses: ClassVar[bool] = False
    scoring_precision: ClassVar[str] = "highest"
    judges_long: ClassVar[bool] = False
    gpus: ClassVar[int] = 0
    profiler_activities: ClassVar[Sequence[ProfilerActivity]] = ()
    upload_threads: ClassVar[int] = 1
    # Of searches on two cores of a server's CPU, see studies/search_cost.
    paces: ClassVar[Paces] = Paces(
        timing_s=1.2,
        score_s=300.0,
        proof_s=5.0,
        proof_linear_s=0.3,
        deliver_s=45.0,
        deliver_linear_s=0.15,
    )
    arithmetic: ClassVar[Sequence[str]] = ("bfloat16", "float16", "float32")
    copy_bytes: ClassVar[int] = 128 << 20
    product_side: ClassVar[int] = 1024

    def __init__(self, device: str) -> None:
        self.device = device

    # -- identity ----------------------------------------------------------------------------------

    @classmethod
    def count(cls) -> int:
        """Return how many devices of this kind PyTorch sees."""
        return 1

    def places(self) -> list[Place]:
        """Return parts of this host that compute equally fast, this device first."""
        return [Place(self.device)]

    @classmethod
    @abstractmethod
    def missing_reason(cls) -> str:
        """Return why there may be no device of this kind, and what to do."""

    @abstractmethod
    def fingerprint(self) -> Device:
        """Return the key of timings: the device, its settings now, and versions of libraries."""

    def about(self) -> Mapping[str, str]:
        """Return what a user should know of the device, in words by topic."""
        return {"device": self.device}

    def concerns(self) -> Mapping[str, str]:
        """Return what is wrong with the device now, and what to do about each."""
        return {}

    def float16(self) -> torch.dtype:
        """Return the better 16-bit float of the device."""
        return torch.bfloat16

    def converts_float8(self) -> bool:
        """Check whether compiled code on the device converts float8."""
        return True

    # -- time --------------------------------------------------------------------------------------

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""

    def clock(self, call: Call, positions: int, linears: int, effort: TimingEffort) -> Clock:
        """Return what times a candidate.

        Args:
            call: Computes `linears` linears at once.
            positions: Positions of the rotation of weights.
        """
        return HostClock(
            call, positions, linears=linears, synchronize=self.synchronize, sample_s=effort.sample_s
        )

    def time_s(self, call: Callable[[], object]) -> float:
        """Return the seconds that one call takes."""
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def watch_load(self) -> Load:
        """Watch from now on what could disturb a measurement."""
        return OtherLoad()

    def event(self) -> Event | None:
        """Return a place behind all work so far, or None if the device does its work at once."""
        return None

    # -- memory ------------------------------------------------------------------------------------

    def free_bytes(self) -> int | None:
        """Return how much of the device's own memory is free, or None if it shares the host's."""
        return None

    def room_bytes(self) -> int | None:
        """Return how much memory models here may take beside what they have, or None if unknown.

        It is the device's own memory, or the host's, as far as the user allows it.
        """
        limit, available = memory_limit(), available_bytes()
        known = [each for each in (limit, available) if each is not None]
        return min(known, default=None)

    def keep_to_limit(self) -> None:  # noqa: B027 - there may be no way to
        """Let PyTorch allocate no more here than the user allows, where that can be done."""

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor on the device. What reads it there waits for it."""
        return tensor.to(self.device, copy=True)

    def trim_memory(self) -> None:
        """Return freed memory to the system."""
        trim_memory()

    def reset_peak(self) -> None:  # noqa: B027 - there may be nothing to watch
        """Start to watch how much memory is allocated."""

    def peak_bytes(self) -> int | None:
        """Return the most bytes allocated beyond those at `reset_peak`, or None if unknown."""
        return None

    def most_bytes(self) -> int | None:
        """Return the most bytes that were allocated since the last call, or None if unknown."""
        return None

    # -- compilation -------------------------------------------------------------------------------

    def compile_failure(self) -> str | None:
        """Return why `torch.compile` does not work here and what to do, or None."""
        if os.environ.get("AUTOQUANT_EAGER"):
            return "AUTOQUANT_EAGER is set; unset it to compile"
        return failure_of_the_compiler(self.type)

    def warm_compiler(self) -> None:  # noqa: B027 - there may be nothing to start
        """Start what compiles kernels, if that takes long, without waiting for it."""

    def graph_pool(self) -> Any:
        """Return memory that several graphs share, or None."""
        return None

    def graphed(
        self,
        step: Callable[..., torch.Tensor],
        state: Callable[[], Sequence[torch.Tensor]],
        pool: Any = None,
    ) -> Callable[..., torch.Tensor]:
        """Return the step, replayed as what it did when it was first called, where that is quicker.

        Args:
            step: Takes tensors and returns a tensor. It may change tensors that it holds; every
                replay makes such changes again.
            state: Returns the tensors that a step advances.
            pool: From `graph_pool`. Steps that share it run one at a time, and the output of one is
                read before the next runs.
        """
        return step


@functools.cache
def failure_of_the_compiler(device: str) -> str | None:
    """Return why `torch.compile` fails on a device and what to do, or None if it works."""
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 - after any failure, models run eagerly
        raise_if_full(error)
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        return f"{reason}; install a C++ compiler (g++ or clang++) to compile"
    return None


def library_versions() -> dict[str, str]:
    """Return the versions of PyTorch, and of installed libraries and plug-ins with kernels."""
    found: dict[str, str] = {"torch": torch.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | _plug_in_versions()


def _plug_in_versions() -> dict[str, str]:
    found = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        with suppress(KeyError, TypeError):  # installed without a name or version
            if point.dist is not None:
                found[f"plug-in {point.dist.name}"] = point.dist.version
    return found
