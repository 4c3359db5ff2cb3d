"""Linears, what they are timed on, and what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from autoquant.records.numbers import Count, NonNegative, Positive

Outcome = Literal["ok", "unsupported", "bounded", "beaten", "incorrect", "failed"]
"""What came of a timing.

`bounded` was never prepared, because the roofline shows that it cannot win. `beaten` was tried
and is far behind.
"""


def content_key(value: object, length: int = 12) -> str:
    """Return a hash of `value`'s canonical JSON, which is the same in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """What one linear computes: `y[m, n] = x[m, k] @ w[n, k].T (+ bias[n])`.

    Attributes:
        dtype: The dtype of x, w and y.
    """

    n: Positive
    k: Positive
    bias: bool
    dtype: str

    def __str__(self) -> str:
        return f"{self.n}x{self.k}{'+bias' if self.bias else ''}:{self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A fingerprint of what runs the kernels.

    A change of any field changes the key in the store.
    """

    type: str
    name: str
    capability: str
    threads: Count
    cache_bytes: Count
    versions: Mapping[str, str]

    @property
    def key(self) -> str:
        return content_key(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingSubject:
    """What is timed: one candidate on one shape and m.

    Attributes:
        working_set_bytes: Bytes of weights that a timing rotates through, so that they are cold.
    """

    shape: LinearShape
    m: Positive
    format: str
    kernel: str
    working_set_bytes: Count

    @property
    def candidate(self) -> str:
        return f"{self.format}/{self.kernel}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The outcome of timing one subject: samples, or a reason for having none."""

    subject: TimingSubject
    outcome: Outcome
    reason: str = ""
    samples_us: tuple[NonNegative, ...] = ()
    relative_error: float | None = None

    @property
    def latency_us(self) -> float:
        """Median of the samples."""
        ordered = sorted(self.samples_us)
        middle = len(ordered) // 2
        if len(ordered) % 2:
            return ordered[middle]
        return (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def spread_us(self) -> float:
        """Interquartile range of the samples."""
        ordered = sorted(self.samples_us)
        return ordered[(3 * len(ordered)) // 4] - ordered[len(ordered) // 4]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The two measured limits of a device that no kernel passes.

    Attributes:
        bandwidth_bytes_per_s: Bytes read plus bytes written in memory beyond the last-level cache.
        flops_per_s: Rate of a large matrix product, by arithmetic (`bfloat16`, `float16`,
            `float32`, `int8`, `float8`) that the device has.
    """

    bandwidth_bytes_per_s: NonNegative
    flops_per_s: Mapping[str, NonNegative]
