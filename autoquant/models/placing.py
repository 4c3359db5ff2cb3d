"""Move a model to its device, by several threads where that is quicker."""

from __future__ import annotations

from torch import nn

from autoquant.devices import backend
from autoquant.models.threads import in_threads


def moved(module: nn.Module, device: str) -> nn.Module:
    """Move a module in place, as `module.to(device)` does.

    Parameters of mapped files go straight from there to the device.
    """
    place = backend(device)
    if place.upload_threads > 1:
        away = [each for each in module.parameters() if each.device.type != place.type]

        def move(parameter: nn.Parameter) -> None:
            parameter.data = place.upload(parameter.data)

        in_threads(move, away, place.upload_threads)
    return module.to(device)
