"""Timings of single linears, with the working set that all of them were made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoquant.candidates import Kernel
from autoquant.records import LinearShape, Measurement, TimingSubject


@dataclass(frozen=True, slots=True)
class TimingTable:
    """Measurements by subject.

    Attributes:
        working_set_bytes: How cold the weights were; timings with another working set are not seen.
    """

    working_set_bytes: int
    measurements: Mapping[TimingSubject, Measurement] = field(default_factory=dict)

    def of(self, shape: LinearShape, format_id: str) -> FormatTimings:
        """Return what was measured of a format on a shape.

        Args:
            format_id: The format that was timed, see `autoquant.candidates.timed_as`.
        """
        return FormatTimings(shape, format_id, self)

    def measurement(self, subject: TimingSubject) -> Measurement:
        """Return the measurement of a subject; one that was not timed is unsupported."""
        found = self.measurements.get(subject)
        if found is None:
            return Measurement(subject=subject, outcome="unsupported", reason="not timed")
        return found

    def missing(self, subjects: Sequence[TimingSubject]) -> list[TimingSubject]:
        """Return the subjects that are not in the table, each once."""
        return [subject for subject in dict.fromkeys(subjects) if subject not in self.measurements]

    def extended(self, measurements: Mapping[TimingSubject, Measurement]) -> TimingTable:
        """Return a table with further measurements."""
        return replace(self, measurements={**self.measurements, **measurements})


@dataclass(frozen=True, slots=True)
class FormatTimings:
    """The part of a table about one format on one shape, by kernel and m."""

    shape: LinearShape
    format: str
    table: TimingTable

    def subject(self, kernel: str, m: int) -> TimingSubject:
        """Return what a timing of `kernel` at `m` is about."""
        return TimingSubject(
            shape=self.shape,
            m=m,
            format=self.format,
            kernel=kernel,
            working_set_bytes=self.table.working_set_bytes,
        )

    def latency_us(self, kernel: str, m: int) -> float | None:
        """Return the latency, or None if the kernel was not timed or cannot be used."""
        found = self.table.measurement(self.subject(kernel, m))
        return found.latency_us if found.outcome == "ok" else None

    def fastest(self, kernels: Sequence[Kernel], allowed: Sequence[str], m: int) -> str | None:
        """Return the fastest kernel at `m`, or None if none can be used.

        Args:
            allowed: The activation roundings that the kernel may have.
        """
        usable = {k.id: self.latency_us(k.id, m) for k in kernels if k.numerics in allowed}
        timed = {kernel: latency for kernel, latency in usable.items() if latency is not None}
        return min(timed, key=lambda kernel: timed[kernel], default=None)

    def first_reason(self, kernels: Sequence[Kernel], rows: Sequence[int]) -> str:
        """Return the reason of the first kernel that cannot be used at one of these m."""
        made = (self.table.measurement(self.subject(k.id, m)) for k in kernels for m in rows)
        return next(measurement.reason for measurement in made if measurement.outcome != "ok")

    def rows(self) -> list[int]:
        """Return the m at which something was measured, in order."""
        own = (self.shape, self.format, self.table.working_set_bytes)
        subjects = self.table.measurements
        return sorted({s.m for s in subjects if (s.shape, s.format, s.working_set_bytes) == own})

    def crossover(self, low: int, high: int, before: str, after: str) -> tuple[int, int]:
        """Narrow where `after` overtakes `before` to two neighbouring measured m.

        Args:
            low: An m at which `before` is still the faster kernel.
            high: An m at which `after` is the faster one.
        """
        for m in (m for m in self.rows() if low < m < high):
            first, second = self.latency_us(before, m), self.latency_us(after, m)
            if self._cannot(before, m) or (first and second and second < first):
                return low, m
            if self._cannot(after, m) or (first and second):
                low = m
        return low, high

    def _cannot(self, kernel: str, m: int) -> bool:
        """Check whether a kernel is known not to be usable at `m`."""
        found = self.table.measurements.get(self.subject(kernel, m))
        return found is not None and found.outcome != "ok"
