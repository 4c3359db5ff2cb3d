"""The alternatives to a layer's choice, and what they would change. No torch.

Changes are those of the additive model that plans are solved with: of the layer's own time, loss
and bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autoquant.records import LayerChoice, Workload, request_time

Gain = Literal["more exact", "faster", "smaller"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another choice for a layer, with predicted differences (its own less the present choice's).

    Attributes:
        gains: In what it is the next better choice.
        request_us: Microseconds in one request, all phases with all their calls.
    """

    gains: tuple[Gain, ...]
    choice: LayerChoice
    request_us: float
    memory_bytes: int
    loss: float


Alternatives = Mapping[str, Sequence[Alternative]]
"""By layer name."""


def next_more_exact(
    own: LayerChoice, options: Iterable[LayerChoice], workload: Workload
) -> LayerChoice | None:
    """Return the fastest option with less loss, or None."""
    return min((c for c in options if c.loss < own.loss), key=_time_us(workload), default=None)


def next_faster(
    own: LayerChoice, options: Iterable[LayerChoice], workload: Workload
) -> LayerChoice | None:
    """Return the option with least loss of those that take less time, or None."""
    time_us = _time_us(workload)
    return min(
        (c for c in options if time_us(c) < time_us(own)), key=lambda c: c.loss, default=None
    )


def next_smaller(own: LayerChoice, options: Iterable[LayerChoice]) -> LayerChoice | None:
    """Return the option with least loss of those that take fewer bytes, or None."""
    return min(
        (c for c in options if c.memory_bytes < own.memory_bytes),
        key=lambda c: c.loss,
        default=None,
    )


def alternatives(
    own: LayerChoice, options: Sequence[LayerChoice], workload: Workload
) -> tuple[Alternative, ...]:
    """Return the next more exact, the next faster and the next smaller choice, each once.

    A choice that computes layers as one counts by this layer's share of it. What it changes in the
    other layers is not counted.

    Args:
        options: All choices that plans were solved from for this layer.
    """
    same = [
        c
        for c in options
        if (c.format, c.numerics, c.joined) == (own.format, own.numerics, own.joined)
    ]
    others = [c for c in options if c not in same]
    # Only the options' latencies are sure to be in whole-model time, so compare these.
    base = min(same, key=_time_us(workload), default=own)
    found: list[tuple[Gain, LayerChoice | None]] = [
        ("more exact", next_more_exact(base, others, workload)),
        ("faster", next_faster(base, others, workload)),
        ("smaller", next_smaller(base, others)),
    ]
    # One choice may be the next in several ways: it is shown once, at the first of them.
    gains: dict[int, list[Gain]] = {}
    for gain, choice in found:
        gains.setdefault(id(choice), []).append(gain)
    distinct = {id(choice): choice for _, choice in found if choice is not None}
    return tuple(
        _alternative(base, choice, tuple(gains[key]), workload) for key, choice in distinct.items()
    )


def _alternative(
    base: LayerChoice, choice: LayerChoice, gains: tuple[Gain, ...], workload: Workload
) -> Alternative:
    time_us = _time_us(workload)
    return Alternative(
        gains=gains,
        choice=choice,
        request_us=time_us(choice) - time_us(base),
        memory_bytes=choice.memory_bytes - base.memory_bytes,
        loss=choice.loss - base.loss,
    )


def _time_us(workload: Workload) -> Callable[[LayerChoice], float]:
    calls = workload.calls()
    return lambda choice: request_time(choice.latency_us, calls)
