"""Change all linears of a model at once, all or part of the way, on calibration windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates import A16
from autoquant.candidates.calls import product
from autoquant.devices import backend
from autoquant.evaluators.kept import KeptTensor, held_tensors
from autoquant.evaluators.logits import divergence_sum
from autoquant.evaluators.passes import each_output
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.sensitivity.base import Change, parameter_of, straight
from autoquant.evaluators.sensitivity.gradients import (
    PlacedLinears,
    PlaceKey,
    batch_logits,
    changed_output,
    rounded_activation,
)
from autoquant.evaluators.sensitivity.weights import ChangedWeights, Room
from autoquant.models.loaded import device_of, is_causal_lm
from autoquant.models.streaming import stream_of

_LOGITS_AT_ONCE = 1 << 25
_KEPT_BYTES = 1 << 30
_WINDOWS = 4
"""Of a text on a CPU. Shares of layers are those of eight (studies/sensitivity)."""
_WORTH_COMPILING = 100_000_000
"""Comparing so many logits on a CPU takes longer than compiling what compares them."""
_TIMES_A_BLOCK = 6
"""Memory of a block of 16-bit weights in float32, with changed weights and gradients."""


def by_numerics(changes: Sequence[Change]) -> dict[str, list[Change]]:
    """Return the changes of each numerics by its key, in order."""
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.numerics, []).append(change)
    return found


def dtypes_of(module: nn.Module, changes: Sequence[Change]) -> dict[str, torch.dtype]:
    """Return the dtype of each site's weight by its name, before the weights are widened."""
    return {change.site.name: parameter_of(module, change.site).dtype for change in changes}


def room_for_model(module: nn.Module) -> Room:
    """Return room for the parameters in float32, or for half of a GPU's free memory.

    If blocks are brought one at a time, it is a quarter of what is free beside one in float32.
    """
    place = backend(device_of(module))
    if (stream := stream_of(module)) is not None:
        left_bytes = (place.room_bytes() or 0) - _TIMES_A_BLOCK * stream.largest_bytes
        return Room(max(0, left_bytes // 4))
    free_bytes = place.free_bytes()
    if free_bytes is not None:
        return Room(free_bytes // 2)
    return Room(4 * sum(parameter.numel() for parameter in module.parameters()))


def _shared_bytes(module: nn.Module) -> int:
    """Return the memory for weights that all windows share; 0 where they are soon made again."""
    place = backend(device_of(module))
    if place.free_bytes() is not None or stream_of(module) is not None:
        return 0
    return (place.room_bytes() or 0) // 4


class PathSite:
    """One site on the way from the unquantized output (position 0) to the changed one (1).

    Args:
        keeps: There is memory for two weights beside the changed one, which all windows share.

    Attributes:
        name: The site's name.
        parameter: The site's weight in float32.
        inner: Sum of gradient . (changed output - unquantized output) over the rows since the site
            took its position, a scalar on the device.
    """

    def __init__(
        self,
        parameter: torch.Tensor,
        change: Change,
        weights: ChangedWeights,
        device: torch.device,
        *,
        keeps: bool = False,
    ) -> None:
        self.name = change.site.name
        self.parameter = parameter
        self._change = change
        self._weights = weights
        self._device = device
        self._keeps = keeps
        self._difference: torch.Tensor | None = None
        self.stand_at(0.0)

    @property
    def key(self) -> PlaceKey:
        return id(self.parameter), self._change.site.lookup

    def stand_at(self, position: float) -> None:
        self._position = position
        self.inner = torch.zeros((), device=self._device)
        self._mixed: torch.Tensor | None = None

    def output(self, x: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
        changed = self._weights.changed(self._change)
        if changed is None:
            return product(x, self._original(), ends)
        if self._change.activation == A16 or self._position == 1.0:
            return changed_output(x, self.weight(), self._change, ends)
        return product(x, self._original(), ends).lerp_(
            changed_output(x, changed, self._change, ends), self._position
        )

    def _original(self) -> torch.Tensor:
        return straight(self.parameter, self._change.site)

    def weight(self) -> torch.Tensor:
        changed = self._weights.changed(self._change)
        if changed is None:
            return self._original()
        if self._position == 1.0:
            return changed
        mixed = self._mixed
        if mixed is None:
            mixed = torch.lerp(self._original(), changed, self._position)
            self._mixed = mixed if self._keeps else None
        return mixed

    def observe(self, x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor | None) -> None:
        changed = self._weights.changed(self._change)
        if changed is None:
            return
        # Products of differences: of two outputs little would be left but how they were rounded.
        difference = product(x, self._weight_difference(changed), ends)
        if self._change.activation != A16:
            error = rounded_activation(x, self._change).sub_(x)
            difference += product(error, changed, ends)
        self.inner += difference.mul_(gradient).sum()

    def _weight_difference(self, changed: torch.Tensor) -> torch.Tensor:
        difference = self._difference
        if difference is None:
            difference = changed - self._original()
            self._difference = difference if self._keeps else None
        return difference


class PathTable(PathSite):
    """A table on the way from its unquantized rows to the changed ones."""

    def output(self, x: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
        return F.embedding(x, self.weight())

    def observe(self, x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor | None) -> None:
        changed = self._weights.changed(self._change)
        if changed is not None:
            rows = F.embedding(x, self._weight_difference(changed))
            self.inner += rows.mul_(gradient).sum()


class CalibrationModel:
    """A model in float32, calibration windows in batches, and its unquantized logits.

    Attributes:
        batches: Windows `[batch, tokens]`, as many as their logits have memory for. A model without
            `generate` gets one at a time, because an exported program may take no other number.
        rows: The number of tokens.
    """

    def __init__(self, module: nn.Module, quality: TextQuality) -> None:
        self.module = module
        windows = torch.cat(list(quality.windows("calibration")))
        self.device = windows.device
        place = backend(self.device)
        if not place.judges_long:
            windows = windows[:: math.ceil(len(windows) / _WINDOWS)]
        self.rows = windows.numel()
        each = batch_logits(module, windows[:1]).numel() if is_causal_lm(module) else 0
        fits = _LOGITS_AT_ONCE // each if each else 1
        self.batches = torch.split(windows, max(1, fits))
        # On a GPU computing again is faster than fetching from the disk.
        most_bytes = _KEPT_BYTES // len(self.batches) if place.free_bytes() is None else 0
        self._files = [KeptTensor(most_bytes) for _ in self.batches]
        self._references = held_tensors(self._files, place.room_bytes() or 0)
        self._compiles = (
            not place.judges_long
            and each * len(windows) > _WORTH_COMPILING
            and place.compile_failure() is None
        )
        if stream_of(module) is not None:
            self._keep_all()

    def _keep_all(self) -> None:
        """Make the logits of all batches in one pass over the weights, and keep them."""
        forwards = [partial(batch_logits, self.module, batch) for batch in self.batches]
        for number, logits in enumerate(each_output(self.module, forwards)):
            self._files[number].keep(logits)

    def reference(self, number: int) -> torch.Tensor:
        """Return the unquantized model's logits `[batch, tokens, vocabulary]` on a batch."""
        make = partial(batch_logits, self.module, self.batches[number])
        return self._references[number].get(make)

    def sites(self, changes: Sequence[Change], dtypes: Mapping[str, torch.dtype]) -> list[PathSite]:
        """Return the sites that one numerics changes."""
        room = room_for_model(self.module)
        shared = Room(_shared_bytes(self.module))
        found = []
        for change in changes:
            parameter = parameter_of(self.module, change.site)
            weights = ChangedWeights(parameter, dtypes[change.site.name], room, self.device)
            keeps = shared.take(2 * 4 * parameter.numel())
            kind = PathTable if change.site.lookup else PathSite
            found.append(kind(parameter, change, weights, self.device, keeps=keeps))
        return found

    def whole(self, sites: Sequence[PathSite]) -> float:
        """Return the mean divergence per token in nats with all these sites changed."""
        for site in sites:
            site.stand_at(1.0)
        placed = PlacedLinears(sites)

        def logits_of(batch: torch.Tensor) -> torch.Tensor:
            with placed:
                return batch_logits(self.module, batch)

        total = 0.0
        forwards = [partial(logits_of, batch) for batch in self.batches]
        for number, logits in enumerate(each_output(self.module, forwards)):
            total += divergence_sum(
                self.reference(number).flatten(0, 1),
                logits.flatten(0, 1),
                compiled=self._compiles,
            )
        return max(total / self.rows, 0.0)
