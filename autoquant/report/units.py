"""Numbers for people: microseconds to seconds, KiB to GiB, fractions as percent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

MISSING = "-"
_TIME_UNITS_US = (("s", 1e6), ("ms", 1e3), ("µs", 1.0))
_BYTE_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def digits(value: float, significant: int = 3) -> str:
    """Return `value` with about `significant` digits, no exponent: 0.0123, 1.23, 12.3, 1234."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    decimals = significant - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(decimals, 0), 8)}f}"


def duration_us(value: float) -> str:
    """Return microseconds in a suitable unit."""
    unit, scale = next(
        (pair for pair in _TIME_UNITS_US if abs(value) >= pair[1]), _TIME_UNITS_US[-1]
    )
    return f"{digits(value / scale)} {unit}"


def duration_ms(value: float) -> str:
    """Return milliseconds in a suitable unit."""
    return duration_us(value * 1e3)


def clock_s(seconds: float) -> str:
    """Return seconds as 5s, 3m 20s, 1h 05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def size(value: float) -> str:
    """Return bytes as KiB, MiB or GiB.

    MiB reach up to 10 GiB, so that models of similar size have one unit.
    """
    unit, scale = next(
        (pair for pair in _BYTE_UNITS if value >= pair[1] * (10 if pair[0] == "GiB" else 1)),
        ("B", 1),
    )
    return f"{digits(value / scale)} {unit}" if unit != "B" else f"{value:.0f} B"


def signed(value: float, write: Callable[[float], str]) -> str:
    """Return a difference with its sign. `write` formats its size."""
    return f"{'+' if value > 0 else '-' if value < 0 else ''}{write(abs(value))}"


def percent(fraction: float, *, signed: bool = False) -> str:
    """Return a fraction as percent, with two decimals below 100 %."""
    if not math.isfinite(fraction):
        return str(fraction)
    value = fraction * 100
    decimals = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:{'+' if signed else ''}.{decimals}f}%"


def interval(low: float, high: float) -> str:
    """Return an interval of fractions as percent: `+0.31..+0.53%`."""
    return f"{percent(low, signed=True).rstrip('%')}..{percent(high, signed=True)}"


def common_ms(values: Sequence[float]) -> tuple[str, list[str]]:
    """Return one unit for a column of milliseconds, and its cells with the same decimals."""
    values_us = [value * 1e3 for value in values]
    smallest_us = _smallest(values_us, default=1e3)
    # The largest unit in which no cell is below 1, or else the smallest unit.
    fitting = (pair for pair in _TIME_UNITS_US if smallest_us >= pair[1])
    unit, scale_us = next(fitting, _TIME_UNITS_US[-1])
    return unit, _aligned([value / scale_us for value in values_us])


def common_bytes(values: Sequence[float]) -> tuple[str, list[str]]:
    """Return one unit for a column of bytes, and its cells with the same decimals."""
    smallest = min(values, default=2**20)
    unit, scale = next((pair for pair in _BYTE_UNITS if smallest >= pair[1]), ("B", 1))
    return unit, _aligned([value / scale for value in values])


def _aligned(values: Sequence[float]) -> list[str]:
    """Write values with the decimals that give the smallest one three digits, at most four."""
    magnitude = math.floor(math.log10(_smallest(values, default=1.0)))
    decimals = min(max(2 - magnitude, 0), 4)
    return [f"{value:.{decimals}f}" if math.isfinite(value) else str(value) for value in values]


def _smallest(values: Sequence[float], default: float) -> float:
    """Return the smallest size of the values that are finite and not 0."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    return min(sizes, default=default)
