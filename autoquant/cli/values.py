"""Read option values as people write them: `1%`, `2GiB`, `10m`."""

from __future__ import annotations

import math
import re

from autoquant import files
from autoquant.errors import WorkloadError

_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_DURATION = re.compile(
    rf"(?:({_NUMBER})h)?(?:({_NUMBER})m)?(?:({_NUMBER})s?)?", re.IGNORECASE | re.ASCII
)


def fraction(text: str, option: str) -> float:
    """Read `1%` or `0.01`, both as 0.01.

    Raises:
        WorkloadError: It is neither, or negative, or a bare number from 1 on, which is ambiguous.
    """
    advice = (
        f"{option}: cannot read {text!r}; write a percentage such as 1% or a fraction such as 0.01"
    )
    number, is_percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    value = _number(number) / (100 if is_percent else 1)
    if not math.isfinite(value) or value < 0:
        raise WorkloadError(advice)
    if value >= 1 and not is_percent:
        raise WorkloadError(f"{option}: {text} is ambiguous; write {number}% or a fraction below 1")
    return value


def _number(text: str) -> float:
    """Return a number in plain digits, or NaN. Python also takes `1_0` and digits of any script."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def nats(text: str, option: str) -> float:
    """Read `0.02` as a divergence.

    Raises:
        WorkloadError: It is no number, or is negative.
    """
    value = _number(text)
    if not math.isfinite(value) or value < 0:
        raise WorkloadError(f"{option}: cannot read {text!r}; write nats per token such as 0.02")
    return value


def size_bytes(text: str, option: str) -> int:
    """Read `2GiB`, `500MB` or `123456` as bytes.

    Raises:
        WorkloadError: It is none of these, or is not positive.
    """
    value = files.size_bytes(text)
    if value is None:
        raise WorkloadError(
            f"{option}: cannot read {text!r}; write a size such as 2GiB, 500MB or 123456 (bytes)"
        )
    return value


def duration_s(text: str, option: str) -> float:
    """Read `10m`, `90s`, `1h30m` or `600` as seconds.

    Raises:
        WorkloadError: It is none of these, or is not positive.
    """
    match = _DURATION.fullmatch(text.strip())
    value = 0.0
    if match:
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        value = hours * 3600 + minutes * 60 + seconds
    if value <= 0:
        raise WorkloadError(
            f"{option}: cannot read {text!r}; write a time such as 10m, 90s, 1h30m or 600 (seconds)"
        )
    return value
