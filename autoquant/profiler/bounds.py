"""Which candidates cannot win, whatever their kernels do: what the roofline says, against what was tried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoquant.candidates import A16, Kernel, get_format
from autoquant.profiler.floor import ELEMENT_BYTES, floor_us
from autoquant.records import LinearShape, Measurement, Roofline, TimingSubject

_HEADROOM = 1.15
"""How much faster than the measured roofline a kernel may be: reading alone is faster than copying."""
_CACHE_SPEEDUP = 4.0
"""How much faster than memory the last-level cache may be, through which a weight that was just written may be read."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What trying a candidate out showed: its latency at most, and the bytes of the weight as stored."""

    latency_us: float
    stored_bytes: int


def least_us(kernel: Kernel, shape: LinearShape, m: int, stored_bytes: int, roofline: Roofline) -> float:
    """Microseconds that a kernel takes at least."""
    least = floor_us(roofline, shape, m, stored_bytes, kernel.arithmetic or shape.dtype)
    if kernel.materializes:
        moved = 2 * shape.n * shape.k * (1 if kernel.arithmetic == "int8" else ELEMENT_BYTES[shape.dtype])
        least += 1e6 * moved / (_CACHE_SPEEDUP * roofline.bandwidth_bytes_per_s)
    return least / _HEADROOM


def bounded(
    subjects: Sequence[TimingSubject], tried: Mapping[TimingSubject, Tried], roofline: Roofline
) -> dict[TimingSubject, Measurement]:
    """Those of `subjects` that a kernel of the same format, no less exact, is sure to beat."""
    found = {}
    for subject in subjects:
        rivals = {
            other: fact.latency_us
            for other, fact in tried.items()
            if (other.format, other.shape, other.m) == (subject.format, subject.shape, subject.m)
            and _numerics(other) in (A16, _numerics(subject))
        }
        if not rivals:
            continue
        best = min(rivals, key=lambda other: rivals[other])
        kernel = get_format(subject.format).kernel(subject.kernel)
        least = least_us(kernel, subject.shape, subject.m, tried[best].stored_bytes, roofline)
        if least > rivals[best]:
            reason = f"takes at least {least:.1f} us by the roofline; {best.kernel} took {rivals[best]:.1f}"
            found[subject] = Measurement(subject=subject, outcome="bounded", reason=reason)
    return found


def _numerics(subject: TimingSubject) -> str:
    return get_format(subject.format).kernel(subject.kernel).numerics
