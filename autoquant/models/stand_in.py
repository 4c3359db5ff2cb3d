"""A model that takes as long as a streamed one, and has room on the device.

Its first blocks keep their weights, and all other blocks compute with those again. So it is
compiled and timed as the model itself would be, with its embeddings, head and cache, and with every
block in its place. What it computes is nonsense.
"""

from __future__ import annotations

from torch import nn

from autoquant.devices import backend
from autoquant.models.copies import shallow_copy
from autoquant.models.fitting import SPARE
from autoquant.models.streaming import Stream, place_whole, share_blocks, stream_of
from autoquant.records import STAND_IN


def to_time(module: nn.Module) -> tuple[nn.Module, str]:
    """Return a copy of a model to time, and a note if it is a stand-in; else an empty text."""
    stream = stream_of(module)
    copied = shallow_copy(module)
    if stream is None:
        return copied, ""
    words = share_blocks(copied, int(SPARE * (backend(stream.device).room_bytes() or 0)))
    place_whole(copied, stream)
    return copied, f"{STAND_IN} {words}, used again for the others"


def largest_plan_bytes(stream: Stream, room_bytes: int) -> int:
    """Return how large a plan may be that is timed in turn with a stand-in.

    Args:
        room_bytes: What the device has room for, with nothing there.
    """
    beside = max(SPARE * room_bytes, stream.largest_bytes) + stream.head_bytes
    return max(0, int((1 - SPARE) * room_bytes - beside))
