"""Refuse a `config.json` that describes a far larger model than its weights are.

transformers builds what the configuration says before it looks at the weights. A wrong number there
would take any time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from autoquant.errors import ModelError
from autoquant.files import read_json_object
from autoquant.models.families import CAUSAL_LM, family_of

_TIMES, _SPARE_ELEMENTS = 2, 2**26  # for tied weights, masks, and tensors that files leave out
_SPARE_LAYERS = 1000
_MOST_LABELS = 10**6


class _TooLargeError(Exception):
    """The module that is being built has more elements than it may."""


def check_size(folder: Path, elements: int, tensors: int) -> None:
    """Check that a folder's configuration describes no larger model than its weights can fill.

    The model is built without memory, until it is too large.

    Args:
        elements: Of all weights together, as stored.
        tensors: How many there are.

    Raises:
        ModelError: `config.json` describes a larger model.
    """
    import transformers

    path = folder / "config.json"
    check_labels(path)
    with suppress(OSError, ValueError):  # the loader reports it
        for name, count in _counts_of_layers(read_json_object(path)):
            if count > tensors + _SPARE_LAYERS:
                raise _larger(path, f"{count:,} {name}", f"{tensors:,} tensors")
    most = _TIMES * elements + _SPARE_ELEMENTS
    try:
        with torch.device("meta"), _at_most(most):
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            family = family_of(read_json_object(path), folder) or CAUSAL_LM
            getattr(transformers, family.auto).from_config(config)
    except _TooLargeError as error:
        raise _larger(path, f"more than {most:,} elements", f"{elements:,}") from error
    except Exception:  # noqa: BLE001 - the loader reports it
        return


def check_labels(path: Path) -> None:
    """Check that a `config.json` names no more labels than a classifier may have.

    transformers makes a name for each as soon as it reads the number.

    Raises:
        ModelError: It has more.
    """
    with suppress(OSError, ValueError):  # the loader reports it
        labels = read_json_object(path).get("num_labels")
        if isinstance(labels, int) and labels > _MOST_LABELS:
            raise ModelError(f"{path} has {labels:,} for num_labels: download or save it again")


def _larger(path: Path, described: str, stored: str) -> ModelError:
    return ModelError(
        f"{path} describes a model of {described}, and the weights beside it have {stored}:"
        " download or save the model again, with the config.json that belongs to it"
    )


def _counts_of_layers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts_of_layers(value)
        elif "layer" in name and isinstance(value, int):
            yield name, value


@contextmanager
def _at_most(elements: int) -> Iterator[None]:
    """Inside, stop the building of modules at a number of elements in parameters and buffers."""
    total = 0

    def count(_module: nn.Module, _name: str, tensor: torch.Tensor | None) -> None:
        nonlocal total
        total += 0 if tensor is None else tensor.numel()
        if total > elements:
            raise _TooLargeError

    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
