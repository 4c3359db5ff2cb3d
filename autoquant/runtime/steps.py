"""One step of a model, kernel by kernel: the layer or the kind of each, and the gaps between them.

Times are microseconds. The kernels' times and the gaps add up to the step's.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

LINEAR = "linear"
OTHER = "other"
UNKNOWN = "not attributed"
_GLUE = (
    ("guards of compiled code", r"torchdynamo|aotdispatcher|pregraph"),
    (
        "attention",
        r"softmax|^(?!.*(cpp|poi|red|per)_fused).*(sdpa|scaled_dot_product|flash|fmha|aten::(badd)?bmm)",
    ),
    ("activation rounding", r"amax|quantize|qparams|scale_activations"),
    ("norms", r"rsqrt|norm"),
    (
        "copies and casts",
        r"(?<!_to)_copy|clone|memcpy|memset|aten::(copy_|cat|to\b|contiguous|_to_copy)",
    ),
)
GLUE = (*(kind for kind, _ in _GLUE), OTHER)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """A kernel on a GPU, or an operator or compiled kernel on the CPU, that ran in a step.

    Attributes:
        kind: `LINEAR`, one of `GLUE`, or `UNKNOWN` if its launch was not found.
        layers: The linears whose weights it reads: several where they are computed as one.
        start_us: From the step's beginning.
        duration_us: What it adds to the step; less than it took where it overlaps with one that
            began before.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    start_us: float
    duration_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """What one step of a phase did, in the order of time.

    Attributes:
        step_us: On the CPU the whole call, on a GPU from the first kernel's beginning to the last
            one's end.
    """

    phase: str
    step_us: float
    kernels: tuple[KernelTime, ...]

    def gaps(self) -> list[tuple[float, float]]:
        """Return (start, duration) of every time in which nothing ran."""
        found = []
        end = 0.0
        for kernel in self.kernels:
            if kernel.start_us > end:
                found.append((end, kernel.start_us - end))
            end = max(end, kernel.start_us + kernel.duration_us)
        if self.step_us > end:
            found.append((end, self.step_us - end))
        return found

    def gaps_us(self) -> float:
        """Return the time of the step less that of its kernels."""
        return self.step_us - sum(kernel.duration_us for kernel in self.kernels)

    def layer_us(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Return microseconds by linear.

        Args:
            shares: By linear, the proportion in which linears that are computed as one share the
                time of a kernel.
        """
        times: dict[str, float] = {}
        for kernel in self.kernels:
            total = sum(shares.get(name, 1.0) for name in kernel.layers)
            for name in kernel.layers:
                times[name] = (
                    times.get(name, 0.0) + kernel.duration_us * shares.get(name, 1.0) / total
                )
        return times

    def glue_us(self) -> dict[str, float]:
        """Return microseconds by kind of the kernels of no linear, most first."""
        times: dict[str, float] = {}
        for kernel in self.kernels:
            if kernel.kind != LINEAR:
                times[kernel.kind] = times.get(kernel.kind, 0.0) + kernel.duration_us
        return dict(sorted(times.items(), key=lambda item: -item[1]))


def median_step(steps: Sequence[StepProfile]) -> StepProfile:
    """Return the step whose kernels and gaps take their median time over repetitions.

    If the repetitions did not run the same kernels, it is the one of median time.
    """
    by_time = sorted(steps, key=lambda step: step.step_us)
    if len({tuple(kernel.name for kernel in step.kernels) for step in steps}) > 1:
        return by_time[len(steps) // 2]
    kernels: list[KernelTime] = []
    end_us = 0.0
    for repeated in zip(*(_with_gaps(step) for step in steps), strict=True):
        start_us = end_us + statistics.median(gap_us for gap_us, _ in repeated)
        duration_us = statistics.median(kernel.duration_us for _, kernel in repeated)
        kernels.append(replace(repeated[0][1], start_us=start_us, duration_us=duration_us))
        end_us = start_us + duration_us
    last_us = statistics.median(_after_last(step) for step in steps)
    return replace(steps[0], step_us=end_us + last_us, kernels=tuple(kernels))


def _with_gaps(step: StepProfile) -> list[tuple[float, KernelTime]]:
    """Return each kernel, and how long nothing ran before it."""
    ends = [0.0, *(kernel.start_us + kernel.duration_us for kernel in step.kernels)]
    return [
        (kernel.start_us - end, kernel) for kernel, end in zip(step.kernels, ends, strict=False)
    ]


def _after_last(step: StepProfile) -> float:
    return step.step_us - max(
        (kernel.start_us + kernel.duration_us for kernel in step.kernels), default=0.0
    )


def glue_kind(name: str) -> str:
    """Return the kind of a kernel that reads no linear's weight, by its name.

    A fused kernel is named after all that it computes. It counts as the first kind of `GLUE` that
    its name fits.
    """
    return next((kind for kind, pattern in _GLUE if re.search(pattern, name.lower())), OTHER)
