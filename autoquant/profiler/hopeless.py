"""Candidates that other shapes rule out: they were far behind wherever they were timed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from autoquant.candidates import candidate_of
from autoquant.profiler.bounds import FAR_BEHIND, is_no_less_exact
from autoquant.records import LinearShape, Measurement, TimingSubject

_FEWEST_SHAPES = 2
_LIKE_SIZE = 4
"""Weights differ in size by no more than this factor."""

_Latencies = Mapping[LinearShape, Mapping[str, float]]
"""Microseconds by shape and kernel, of one format under the same conditions."""

_Conditions = tuple[str, int, int]


class Hopeless:
    """Rules candidates out by the timings of a device, which may grow.

    A kernel is ruled out at a shape and m if another one of its format, which rounds no more, was
    more than 2.5 times as fast on every weight of like size that both were timed on at that m, and
    on two of them at least.
    """

    def __init__(self, timings: Iterable[Measurement]) -> None:
        self._known: dict[_Conditions, dict[LinearShape, dict[str, float]]] = defaultdict(dict)
        self.learn(timings)

    def learn(self, timings: Iterable[Measurement]) -> None:
        """Take further timings in."""
        for each in timings:
            if each.outcome == "ok":
                of_format = self._known[_conditions(each.subject)]
                of_format.setdefault(each.subject.shape, {})[each.subject.kernel] = each.latency_us

    def among(
        self, subjects: Sequence[TimingSubject], device_type: str
    ) -> dict[TimingSubject, Measurement]:
        """Return the outcome of each subject that is ruled out."""
        found = {}
        for subject in subjects:
            if reason := self._reason(subject, device_type):
                found[subject] = Measurement(subject=subject, outcome="beaten", reason=reason)
        return found

    def _reason(self, subject: TimingSubject, device_type: str) -> str:
        like = {
            shape: latencies
            for shape, latencies in self._known[_conditions(subject)].items()
            if shape != subject.shape and _is_alike(shape, subject.shape)
        }
        for rival in _rivals(subject, like, device_type):
            ratios = [
                latencies[subject.kernel] / latencies[rival]
                for latencies in like.values()
                if subject.kernel in latencies and rival in latencies
            ]
            if len(ratios) >= _FEWEST_SHAPES and min(ratios) > FAR_BEHIND:
                return (
                    f"took {min(ratios):.1f} to {max(ratios):.1f} times as long as {rival} for"
                    f" {len(ratios)} other shapes"
                )
        return ""


def _conditions(subject: TimingSubject) -> _Conditions:
    """Return what timings must have in common to be compared, beside the device."""
    return subject.format, subject.m, subject.working_set_bytes


def _is_alike(one: LinearShape, other: LinearShape) -> bool:
    sizes = sorted((one.n * one.k, other.n * other.k))
    return one.dtype == other.dtype and sizes[1] <= _LIKE_SIZE * sizes[0]


def _rivals(subject: TimingSubject, like: _Latencies, device_type: str) -> Iterator[str]:
    """Yield the other kernels that were timed, are no less exact, and take the subject's shape."""
    candidate = candidate_of(subject)
    fmt, own = candidate.format, candidate.kernel
    timed = {kernel for latencies in like.values() for kernel in latencies}
    for kernel in fmt.kernels:
        rival = kernel.id in timed and kernel.id != own.id and is_no_less_exact(kernel, own)
        if rival and not fmt.unsupported_reason(kernel, subject.shape, subject.m, device_type):
            yield kernel.id
