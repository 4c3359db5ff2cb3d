"""Change all linears of a model at once, all or part of the way, on calibration windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates import A16
from autoquant.devices import backend
from autoquant.evaluators.kept import KeptTensor
from autoquant.evaluators.logits import divergence_sum
from autoquant.evaluators.passes import each_output
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.sensitivity.base import Change, parameter_of
from autoquant.evaluators.sensitivity.gradients import (
    PlacedLinears,
    batch_logits,
    changed_output,
    rounded_activation,
)
from autoquant.evaluators.sensitivity.weights import ChangedWeights, Room
from autoquant.models.loaded import device_of, is_causal_lm
from autoquant.models.streaming import stream_of

_LOGITS_AT_ONCE = 1 << 25
_KEPT_BYTES = 1 << 30
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


class PathSite:
    """One site on the way from the unquantized output (position 0) to the changed one (1).

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
    ) -> None:
        self.name = change.site.name
        self.parameter = parameter
        self._change = change
        self._weights = weights
        self._device = device
        self.stand_at(0.0)

    def stand_at(self, position: float) -> None:
        self._position = position
        self.inner = torch.zeros((), device=self._device)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        changed = self._weights.changed(self._change)
        if changed is None:
            return F.linear(x, self.parameter)
        if self._change.activation == A16 or self._position == 1.0:
            return changed_output(x, self.weight(), self._change.activation)
        return F.linear(x, self.parameter).lerp_(
            changed_output(x, changed, self._change.activation), self._position
        )

    def weight(self) -> torch.Tensor:
        changed = self._weights.changed(self._change)
        if changed is None:
            return self.parameter
        return torch.lerp(self.parameter, changed, self._position)

    def observe(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        changed = self._weights.changed(self._change)
        if changed is None:
            return
        # Products of differences: of two outputs little would be left but how they were rounded.
        difference = F.linear(x, changed - self.parameter)
        if self._change.activation != A16:
            error = rounded_activation(x, self._change.activation).sub_(x)
            difference += F.linear(error, changed)
        self.inner += difference.mul_(gradient).sum()


class CalibrationModel:
    """A model in float32, its calibration windows in batches, and its unquantized logits.

    Attributes:
        batches: Windows `[batch, tokens]`, as many as their logits have memory for. A model without
            `generate` gets one at a time, because an exported program may take no other number.
        rows: The number of tokens.
    """

    def __init__(self, module: nn.Module, quality: TextQuality) -> None:
        self.module = module
        windows = torch.cat(list(quality.windows("calibration")))
        self.device = windows.device
        self.rows = windows.numel()
        fits = 1
        if is_causal_lm(module):
            fits = _LOGITS_AT_ONCE // batch_logits(module, windows[:1]).numel()
        self.batches = torch.split(windows, max(1, fits))
        # A GPU keeps as many logits as leave room for all else: computing is faster than fetching.
        free_bytes = backend(self.device).free_bytes()
        self._room = Room((free_bytes or 0) // 8)
        self._there: dict[int, torch.Tensor] = {}
        self._kept = [
            KeptTensor(_KEPT_BYTES // len(self.batches) if free_bytes is None else 0)
            for _ in self.batches
        ]
        if stream_of(module) is not None:
            self._keep_all()

    def _keep_all(self) -> None:
        """Make the logits of all batches in one pass over the weights, and keep them."""
        forwards = [partial(batch_logits, self.module, batch) for batch in self.batches]
        for number, logits in enumerate(each_output(self.module, forwards)):
            self._kept[number].keep(logits)

    def reference(self, number: int) -> torch.Tensor:
        """Return the unquantized model's logits `[batch, tokens, vocabulary]` on a batch."""
        if number in self._there:
            return self._there[number]
        logits = self._kept[number].get(partial(batch_logits, self.module, self.batches[number]))
        if self._room.take(logits.nbytes):
            self._there[number] = logits
        return logits

    def sites(self, changes: Sequence[Change], dtypes: Mapping[str, torch.dtype]) -> list[PathSite]:
        """Return the sites that one numerics changes."""
        room = room_for_model(self.module)
        found = []
        for change in changes:
            parameter = parameter_of(self.module, change.site)
            weights = ChangedWeights(parameter, dtypes[change.site.name], room, self.device)
            found.append(PathSite(parameter, change, weights, self.device))
        return found

    def whole(self, sites: Sequence[PathSite]) -> float:
        """Return the mean divergence per token in nats with all these sites changed."""
        for site in sites:
            site.stand_at(1.0)
        placed = PlacedLinears({id(site.parameter): site for site in sites})

        def logits_of(batch: torch.Tensor) -> torch.Tensor:
            with placed:
                return batch_logits(self.module, batch)

        total = 0.0
        forwards = [partial(logits_of, batch) for batch in self.batches]
        for number, logits in enumerate(each_output(self.module, forwards)):
            total += divergence_sum(self.reference(number).flatten(0, 1), logits.flatten(0, 1))
        return max(total / self.rows, 0.0)
