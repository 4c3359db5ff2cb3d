"""Import and call what a user names as `package.module:callable`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from autoquant.errors import ModelError, first_line
from autoquant.hints import did_you_mean
from autoquant.models.quiet import current_folder_importable


def import_named(spec: str, option: str, use: str) -> Callable[..., Any]:
    """Import the callable that `spec` names.

    The current folder is searched only within `current_folder_importable`.

    Args:
        spec: `package.module:callable`.
        option: Where the user wrote it, for messages.
        use: What the callable is for, e.g. `returns the module`.

    Raises:
        ModelError: It cannot be imported, is not there, or cannot be called.
    """
    place, _, name = spec.partition(":")
    if not place or not name:
        raise ModelError(f"cannot read {option} {spec!r}: write it as package.module:callable")
    try:
        module = importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"cannot import {place} of {option} ({first_line(error)}): run where it can be imported"
            " from"
        ) from error
    try:
        found = reduce(getattr, name.split("."), module)
    except AttributeError as error:
        raise ModelError(
            f"{place} has no {name}{did_you_mean(name, vars(module))}: check {option} {spec}"
        ) from error
    if not callable(found):
        raise ModelError(
            f"{name} in {place} cannot be called: {option} needs a callable that {use}"
        )
    function: Callable[..., Any] = found
    return function


def call_named(function: Callable[[], Any], spec: str, option: str) -> Any:
    """Call it without arguments and return what it returns.

    Raises:
        ModelError: It failed.
    """
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{option} {spec} failed ({type(error).__name__}: {first_line(error)}): fix it;"
            " it is called without arguments, and --debug shows where it failed"
        ) from error


def quality_function(spec: str) -> Callable[..., Any]:
    """Import the function of `--quality`.

    What it imports when it is called must be importable from elsewhere than the current folder.

    Raises:
        ModelError: See `import_named`.
    """
    with current_folder_importable():
        return import_named(spec, "--quality", "takes (module, part) and returns losses")


def example_inputs(
    given: Sequence[Any] | Mapping[str, Any] | str, device: str, dtype: torch.dtype | None
) -> tuple[Any, ...] | dict[str, Any]:
    """Return the inputs that a user gave, or that the callable makes which they named.

    Raises:
        ModelError: See `make_inputs`.
    """
    if isinstance(given, str):
        return make_inputs(given, device, dtype)
    return dict(given) if isinstance(given, Mapping) else tuple(given)


def make_inputs(
    spec: str, device: str, dtype: torch.dtype | None
) -> tuple[Any, ...] | dict[str, Any]:
    """Return the inputs that the callable of `--sample-inputs` makes, on `device`.

    Floating tensors are cast to `dtype`, if it is not None.

    Raises:
        ModelError: As for `import_named`, or it returns neither a tuple nor a dict.
    """
    with current_folder_importable():
        inputs = call_named(
            import_named(spec, "--sample-inputs", "returns a tuple or dict of inputs"),
            spec,
            "--sample-inputs",
        )
    if not isinstance(inputs, (tuple, list, Mapping)):
        raise ModelError(
            f"--sample-inputs {spec} returned a {type(inputs).__name__}: it must return a tuple of"
            " positional arguments or a dict of keyword arguments of one forward pass"
        )

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    placed = tree_map_only(
        torch.Tensor, place, dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs)
    )
    made: tuple[Any, ...] | dict[str, Any] = placed
    return made
