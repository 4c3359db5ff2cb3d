"""Time lookups of rows: what a quantized table takes longer than the unquantized one.

They run uncompiled, one operation after the other, so the time is a bound from above: the compiler
makes one kernel of them. Against a request it is next to nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from autoquant.candidates import Format
from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.floats import original_format
from autoquant.devices import backend
from autoquant.records import Site

_ROWS = 4096  # of the table that is timed; 16 rows of some layouts belong together
_SAMPLES = 9
_CALLS = 5


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a table takes in a format.

    Attributes:
        latency_us: Microseconds in one run of each phase, beyond those of the unquantized table.
        memory_bytes: Of the whole table.
    """

    latency_us: dict[str, float]
    memory_bytes: int


@torch.no_grad()
def time_lookup(table: Site, fmt: Format, device: str) -> Lookup:
    """Return what a table takes in a format that can be looked up.

    A part of the table with Gaussian numbers stands for it: a row takes the same in both.
    """
    shape = table.shape
    itemsize = getattr(torch, shape.dtype).itemsize
    if fmt.id == original_format(shape.dtype):
        return Lookup({}, shape.n * shape.k * itemsize)
    assert fmt.lookup is not None
    look_up = fmt.lookup
    generator = torch.Generator(device).manual_seed(0)
    normal = torch.randn(min(shape.n, _ROWS), shape.k, generator=generator, device=device)
    weight = normal.to(getattr(torch, shape.dtype))
    stored = fmt.store(weight)
    latency_us: dict[str, float] = {}
    for use in table.uses:
        ids = torch.randint(len(weight), (use.m,), generator=generator, device=device)
        quantized_us = _time_us(lambda ids=ids: look_up(stored, ids).to(weight.dtype), device)  # type: ignore[misc]
        plain_us = _time_us(lambda ids=ids: F.embedding(ids, weight), device)  # type: ignore[misc]
        more_us = max(0.0, quantized_us - plain_us)
        latency_us[use.phase] = latency_us.get(use.phase, 0.0) + use.calls * more_us
    return Lookup(latency_us, stored_bytes(stored) * shape.n // len(weight))


def _time_us(call: Callable[[], torch.Tensor], device: str) -> float:
    """Return the median of several samples, in microseconds of one call."""
    samples = []
    for _ in range(_SAMPLES):
        backend(device).synchronize()
        started_s = time.perf_counter()
        for _ in range(_CALLS):
            call()
        backend(device).synchronize()
        samples.append((time.perf_counter() - started_s) / _CALLS)
    return 1e6 * statistics.median(samples)
