"""Move a model to its device, by several threads where that is quicker."""

from __future__ import annotations

from torch import nn

from autoquant.devices import backend
from autoquant.errors import ModelError
from autoquant.models.fitting import gib
from autoquant.models.threads import in_threads


def moved(module: nn.Module, device: str) -> nn.Module:
    """Move a module in place, as `module.to(device)` does.

    Parameters of mapped files go straight from there to the device.

    Raises:
        ModelError: The device has less memory free than they take.
    """
    place = backend(device)
    _check_room(module, device)
    if place.upload_threads > 1:
        away = [each for each in module.parameters() if each.device.type != place.type]

        def move(parameter: nn.Parameter) -> None:
            parameter.data = place.upload(parameter.data)

        in_threads(move, away, place.upload_threads)
    return module.to(device)


def _check_room(module: nn.Module, device: str) -> None:
    place = backend(device)
    away = [each for each in module.parameters() if each.device.type != place.type]
    needed, free_bytes = sum(each.nbytes for each in away), place.free_bytes()
    if free_bytes is not None and needed > free_bytes:
        raise ModelError(
            f"the model takes {gib(needed)}, and {device} has {gib(free_bytes)} of memory free:"
            " free some, or use another device; `autoquant search` and `autoquant apply` read a"
            " Hugging Face folder with safetensors block by block"
        )
