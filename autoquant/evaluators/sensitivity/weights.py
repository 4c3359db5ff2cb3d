"""Weights in the numbers of a format, made when needed and kept while there is room."""

from __future__ import annotations

from functools import partial

import torch

from autoquant.candidates import multiplied_numbers
from autoquant.evaluators.sensitivity.base import Change, straight
from autoquant.models.streaming import brought

KEPT_BYTES = 32 << 20
_SAME_WITHIN = 1e-5


class Room:
    """A budget of bytes to keep, shared by weights that are in use at the same time."""

    def __init__(self, free_bytes: int) -> None:
        self._free_bytes = free_bytes

    def take(self, size_bytes: int) -> bool:
        """Take `size_bytes` if there is room, and return whether there was."""
        if size_bytes > self._free_bytes:
            return False
        self._free_bytes -= size_bytes
        return True


class ChangedWeights:
    """A site's weight under each change, kept while there is room and else made again.

    Args:
        parameter: The weight of the site, in float32 or as it rests.
        dtype: The model's dtype, from which formats are made.
        room: The budget for weights that are kept.
        device: Where changed weights are made.
    """

    def __init__(
        self, parameter: torch.Tensor, dtype: torch.dtype, room: Room, device: torch.device | str
    ) -> None:
        self._parameter = parameter
        self._dtype = dtype
        self._room = room
        self._device = device
        self._kept: dict[str, torch.Tensor | None] = {}

    def changed(self, change: Change) -> torch.Tensor | None:
        """Return the float32 numbers `[n, k]`, of experts `[experts, n, k]`.

        None if neither they nor the activation change.
        """
        key = change.numerics
        if key in self._kept:
            return self._kept[key]
        # Its data is elsewhere each time, if the model is brought to the device block by block.
        original = straight(brought(self._parameter.detach(), self._device), change.site)
        rows = original.flatten(0, -2)  # those of all experts are those of one linear
        make = change.stored or partial(change.format.store, rows.to(self._dtype))
        weight = multiplied_numbers(change.format, make(), change.activation).view(original.shape)
        if change.keeps_input and _is_same(weight, original.float()):
            self._kept[key] = None
            return None
        if self._room.take(weight.nbytes):
            self._kept[key] = weight
        return weight


def room_for_site(parameter: torch.Tensor, count: int) -> Room:
    """Return room for `count` changes of a site if they are small, else for none."""
    wanted = 4 * parameter.numel() * count
    return Room(wanted if wanted <= KEPT_BYTES else 0)


def _is_same(weight: torch.Tensor, unquantized: torch.Tensor) -> bool:
    """Check whether two weights differ by no more than a cast to float16 changes bfloat16."""
    return bool((weight - unquantized).norm() <= _SAME_WITHIN * unquantized.norm())
