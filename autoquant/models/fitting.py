"""What fits into a device's memory, known before the work."""

from __future__ import annotations

from autoquant.devices import backend

SPARE = 1 / 16
"""The share of the memory that is left for a cache, activations and what a library takes."""
_SCORED_BYTES = 4
"""Of an element while layers are scored: they are then computed in float32."""
_PROVEN = 1.5
"""A plan is proven in turn with the unquantized model, and takes half as much or less."""


def fits(elements: int, stored_bytes: int, device: str) -> bool:
    """Check whether a search has room for a whole unquantized model.

    Args:
        elements: Of all its weights.
        stored_bytes: Of all its weights, in the dtype that they have on the device.
    """
    room_bytes = backend(device).room_bytes()
    if room_bytes is None:
        return True
    needed = max(_SCORED_BYTES * elements, _PROVEN * stored_bytes)
    return needed <= (1 - SPARE) * room_bytes


def gib(size_bytes: float) -> str:
    """Return bytes in words for a message."""
    if size_bytes < 2**30:
        return f"{size_bytes / 2**20:.3g} MiB"
    return f"{size_bytes / 2**30:.3g} GiB"
