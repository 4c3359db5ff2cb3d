"""Decide whether a delivered plan may be recommended. No torch."""

from __future__ import annotations

from autoquant.records import DISTURBED, Delivery
from autoquant.solver.limits import Limits


def refusal(delivery: Delivery, limits: Limits, *, instead: bool) -> str:
    """Say why the plan is not recommended; empty if it may be.

    Args:
        instead: The unquantized model is within the limits, so a plan that is no faster is useless.
    """
    if delivery.reason:
        return delivery.reason
    if limits.minimize == "time" and instead and not is_faster(delivery):
        ratio = delivery.ratio
        if ratio and ratio.low < 1 and is_disturbed(delivery):
            return (
                f"it could not be shown to be faster with {delivery.loop}, since other programs"
                " used the machine: on an idle one the same search times it again"
            )
        times = (
            f", but takes {ratio.value:.2f} times as long ({ratio.low:.2f} to {ratio.high:.2f})"
            if ratio
            else ""
        )
        return f"it works{times} as the unquantized model when run with {delivery.loop}"
    return ""


def is_faster(delivery: Delivery) -> bool:
    """Check whether the interval of the plan's time ratio to the unquantized model is below 1."""
    return delivery.ratio is not None and delivery.ratio.high < 1


def is_disturbed(delivery: Delivery) -> bool:
    """Check whether other programs used the machine while the plan was timed."""
    return any(note.startswith(DISTURBED) for note in delivery.notes)
