"""Candidates that need no timing: those that cannot win, and those far behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autoquant.candidates import A16, Kernel, candidate_of
from autoquant.profiler.floor import ELEMENT_BYTES, floor_us
from autoquant.records import LinearShape, Measurement, Roofline, TimingSubject

_HEADROOM = 1.15
"""How much faster than the roofline a kernel may be: reading is faster than copying."""
_CACHE_SPEEDUP = 2.0
"""How much faster than memory the last-level cache may be.

A weight that was just written may be read from it.
"""
FAR_BEHIND = 2.5
"""Beyond this ratio a try-out decides, although it ran while others were being prepared."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate that was tried out: its latency at most, and the bytes of its weight."""

    latency_us: float
    stored_bytes: int


def least_us(
    kernel: Kernel, shape: LinearShape, m: int, stored_bytes: int, roofline: Roofline
) -> float:
    """Return a lower bound of the microseconds that a kernel takes."""
    least = floor_us(roofline, shape, m, stored_bytes, kernel.arithmetic or shape.dtype)
    if kernel.materializes:
        element_bytes = 1 if kernel.arithmetic == "int8" else ELEMENT_BYTES[shape.dtype]
        moved_bytes = 2 * shape.n * shape.k * element_bytes  # written once and read once
        least += 1e6 * moved_bytes / (_CACHE_SPEEDUP * roofline.bandwidth_bytes_per_s)
    return least / _HEADROOM


def bounded(
    subjects: Sequence[TimingSubject], tried: Mapping[TimingSubject, Tried], roofline: Roofline
) -> dict[TimingSubject, Measurement]:
    """Decide on subjects that cannot be as fast as a no less exact kernel of their format."""
    found = {}
    for subject in subjects:
        rival = _best_rival(subject, tried)
        if rival is None:
            continue
        kernel = candidate_of(subject).kernel
        least = least_us(kernel, subject.shape, subject.m, tried[rival].stored_bytes, roofline)
        if least > tried[rival].latency_us:
            reason = f"takes at least {least:.1f} us by the roofline; {_took(rival, tried)}"
            found[subject] = Measurement(subject=subject, outcome="bounded", reason=reason)
    return found


def beaten(
    subjects: Iterable[TimingSubject],
    tried: Mapping[TimingSubject, Tried],
    how: str = "when tried out",
) -> dict[TimingSubject, Measurement]:
    """Decide on subjects that took far longer than a no less exact kernel of their format."""
    found = {}
    for subject in subjects:
        own, rival = tried[subject], _best_rival(subject, tried)
        if rival is not None and own.latency_us > FAR_BEHIND * tried[rival].latency_us:
            reason = f"took {own.latency_us:.1f} us {how}; {_took(rival, tried)}"
            found[subject] = Measurement(subject=subject, outcome="beaten", reason=reason)
    return found


def _best_rival(
    subject: TimingSubject, tried: Mapping[TimingSubject, Tried]
) -> TimingSubject | None:
    """Return the fastest other kernel of the format that rounds the activation no more, or None."""
    rivals = [
        other
        for other in tried
        if (other.format, other.shape, other.m) == (subject.format, subject.shape, subject.m)
        and other != subject
        and is_no_less_exact(candidate_of(other).kernel, candidate_of(subject).kernel)
    ]
    return min(rivals, key=lambda other: tried[other].latency_us, default=None)


def _took(rival: TimingSubject, tried: Mapping[TimingSubject, Tried]) -> str:
    return f"{rival.kernel} took {tried[rival].latency_us:.1f}"


def is_no_less_exact(one: Kernel, other: Kernel) -> bool:
    """Check that a kernel rounds the activation no more than another one."""
    return one.numerics in (A16, other.numerics)
