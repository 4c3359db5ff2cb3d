"""Trace a quantized model into the programs of its ranges."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim, ExportedProgram

from autoquant.candidates.flat import same_bits
from autoquant.delivery.comparison import check_inputs
from autoquant.delivery.programs.plain import plain_copy, routed_weights
from autoquant.delivery.programs.ranges import (
    Range,
    Rows,
    counted,
    fixed,
    ranges,
    rows_of,
    within,
)
from autoquant.delivery.programs.steps import Call, Step, new_cache
from autoquant.errors import PlanError, first_line
from autoquant.models import LoadedModel
from autoquant.runtime.generate import attention

_PLACES, _FEWEST_PLACES, _MOST_PLACES = 256, 16, 1 << 20
"""Places of the cache that a step is traced with, and fewest and most that a program takes."""
_OPEN_SIZE = 5
"""The size that a program for many is traced with, if they allow it: no other length is so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What programs of a model compute, and what is open in them.

    Attributes:
        unit: What a size counts: `batch` or `tokens`.
        dimension: Of the first input, that of the size.
        most: Largest size, or None for any.
        steps: It is a language model with a cache.
        inputs: Returns positional and named arguments of a size.
    """

    unit: str
    dimension: int
    most: int | None
    steps: bool
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def subject_of(loaded: LoadedModel, batch: int) -> Subject:
    """Return what programs of a model compute.

    Args:
        batch: Sequences at a time, for a language model with a cache.
    """
    if loaded.kind == "causal_lm":
        places = min(loaded.max_positions or _PLACES, _PLACES)
        cache = new_cache(loaded.module, batch, places)

        def step(size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            ids = torch.arange(size, device=loaded.device).expand(batch, size) % 7
            start = torch.zeros((), dtype=torch.long, device=loaded.device)
            return (ids, start, *cache), {}

        return Subject(
            unit="tokens", dimension=1, most=loaded.max_positions, steps=True, inputs=step
        )
    given = check_inputs(loaded)
    dimension = 1 if loaded.kind == "token_lm" else 0
    return Subject(
        unit="tokens" if dimension else "batch",
        dimension=dimension,
        most=loaded.max_positions if dimension else None,
        steps=False,
        inputs=lambda size: resized(given, dimension, size),
    )


def ranges_of(
    module: nn.Module, subject: Subject, *, joins_one: bool
) -> tuple[list[Range], str | None]:
    """Return the ranges to make programs for, and why there is only one of one size, or None."""
    weights = routed_weights(module)
    whole = Step(module) if subject.steps else module

    def run(size: int) -> object:
        args, kwargs = subject.inputs(size)
        return whole(*args, **kwargs)

    try:
        rows = rows_of(module, run)
    except Exception as error:  # noqa: BLE001 - a module may take one size only
        reason = first_line(error, with_type=True)
        return [given_size(module, subject)], f"it runs with no other size ({reason})"
    found = ranges(weights, rows, joins_one=joins_one and not subject.steps)
    return within(found, subject.most), None


def given_size(module: nn.Module, subject: Subject) -> Range:
    """Return the range that holds only the size of the sample inputs."""
    args, kwargs = subject.inputs(0)
    size = size_of((args, kwargs), subject.dimension)
    weights = routed_weights(module)
    rows = {
        name: Rows(0, n) for name, n in counted(module, lambda: module(*args, **kwargs)).items()
    }
    return fixed(weights, rows, size, size)


def wrapped(module: nn.Module, subject: Subject, names: tuple[str, ...]) -> nn.Module:
    """Return the module that is traced: its last inputs are those with these names."""
    return Step(module) if subject.steps else Call(module, names)


def trace(module: nn.Module, subject: Subject, found: Range) -> ExportedProgram:
    """Trace a quantized module for the sizes of a range.

    Raises:
        PlanError: It cannot be traced.
    """
    plain = plain_copy(module, found.kernels)
    device = next(module.parameters()).device.type
    if subject.steps and found.most == 1 and device == "cpu" and attention.has_kernels(device):
        attention.use_token_attention(plain)
    one_size = found.least == found.most
    size = min(max(found.least, 1 if one_size else _OPEN_SIZE), found.most or sys.maxsize)
    args, kwargs = subject.inputs(size)
    open_size = None if one_size else Dim("size", min=found.least, max=found.most)
    shapes = _open_shapes(args, kwargs, subject, open_size)
    try:
        with torch.no_grad():
            return torch.export.export(
                wrapped(plain, subject, tuple(kwargs)).eval(),
                (*args, *kwargs.values()),
                dynamic_shapes=shapes,
                strict=False,
            )
    except Exception as error:
        raise PlanError(
            f"torch.export cannot trace this model for {found.name(subject.unit)}"
            f" ({first_line(error, with_type=True)}): `autoquant apply` writes this one"
        ) from error


def _open_shapes(
    args: tuple[Any, ...], kwargs: dict[str, Any], subject: Subject, size: Any
) -> dict[str, Any]:
    """Say which dimensions are open, as `torch.export` takes it."""
    if subject.steps:
        longest = max(subject.most or _MOST_PLACES, _FEWEST_PLACES + 1)
        places = {2: Dim("places", min=_FEWEST_PLACES, max=longest)}
        return {
            "ids": None if size is None else {subject.dimension: size},
            "start": None,
            "cache": tuple(places for _ in args[2:]),
        }
    length = size_of((args, kwargs), subject.dimension)

    def opened(leaf: Any) -> Any:
        return {subject.dimension: size} if size and _has(leaf, subject.dimension, length) else None

    return {"inputs": pytree.tree_map(opened, (*args, *kwargs.values()))}


def resized(
    given: tuple[tuple[Any, ...], dict[str, Any]], dimension: int, size: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with another size, their own ones repeated; 0 leaves them as they are."""
    length = size_of(given, dimension)

    def made(leaf: Any) -> Any:
        if not size or not _has(leaf, dimension, length):
            return leaf
        return leaf.index_select(dimension, torch.arange(size, device=leaf.device) % length)

    args, kwargs = pytree.tree_map(made, given)
    return args, kwargs


def size_of(given: Any, dimension: int) -> int:
    """Return the size of arguments: that of the first tensor that has the dimension; else 1."""
    leaves = pytree.tree_leaves(given)
    return next((leaf.shape[dimension] for leaf in leaves if _has(leaf, dimension, None)), 1)


def _has(leaf: Any, dimension: int, length: int | None) -> bool:
    if not isinstance(leaf, torch.Tensor) or leaf.dim() <= dimension:
        return False
    return length is None or leaf.shape[dimension] == length


def tensors_of(programs: Mapping[str, ExportedProgram]) -> dict[str, torch.Tensor]:
    """Return the tensors that programs hold by name, each once.

    Where programs mean others by one name, it begins with the program's: `tokens_1/c_lifted`.
    """
    found: dict[str, torch.Tensor] = {}
    for name, program in programs.items():
        for key, tensor in (*program.state_dict.items(), *program.constants.items()):
            if not isinstance(tensor, torch.Tensor):
                continue
            other = found.get(key)
            same = other is None or other is tensor or same_bits(other, tensor)
            found[key if same else f"{name}/{key}"] = _alone(tensor.detach())
    return found


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is saved with no more memory than its own."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
