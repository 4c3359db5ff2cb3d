"""Cast the weights of a module, and leave alone what is no weight.

Frequencies, slopes, masks and complex numbers were computed in a dtype of their own. Rounding them
with the weights makes another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autoquant.models.loaded import UNFIT, main_dtype
from autoquant.models.named import example_inputs
from autoquant.models.quiet import some
from autoquant.models.request import SampleInputs
from autoquant.models.targets import dtype_name

_Place = tuple[nn.Module, str]


def cast(
    module: nn.Module, dtype: torch.dtype, device: str, sample_inputs: SampleInputs = None
) -> list[str]:
    """Cast a module on `device` to run in `dtype`.

    Returns:
        A note if buffers had to be cast, too.
    """
    cast_weights(module, dtype)
    inputs = None if sample_inputs is None else example_inputs(sample_inputs, device, dtype)
    needed = cast_needed_buffers(module, dtype, forward_pass(module, inputs, device))
    if not needed:
        return []
    return [
        f"cast to {dtype_name(dtype)} with the weights, without which the model does not run:"
        f" {some(needed)}"
    ]


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of the dtype that most have; all others keep theirs.

    Each gets a new tensor, so that a copy of the module can be cast without the original. Modules
    that transformers keeps in float32 stay so.
    """
    stored = main_dtype(module)
    if stored in (None, dtype):
        return
    exact = _kept_in_float32(module, dtype)
    cast: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter.dtype != stored:
            continue
        wanted = torch.float32 if exact(name) else dtype
        if id(parameter) not in cast:
            cast[id(parameter)] = nn.Parameter(parameter.detach().to(wanted), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = cast[id(parameter)]


def cast_needed_buffers(module: nn.Module, dtype: torch.dtype, run: Callable[[], Any]) -> list[str]:
    """Cast only the buffers that must be cast for the module to run.

    Running statistics, say, must have the dtype of the weights beside them. Complex buffers never
    change.

    Args:
        run: Makes one forward pass. If it fails either way, buffers stay as they are.

    Returns:
        The names of the buffers that were cast, without the path to them.
    """
    groups: dict[str, list[_Place]] = {}
    for owner in module.modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype != dtype:
                groups.setdefault(leaf, []).append((owner, leaf))
    if not groups or _runs(run):
        return []
    original = {leaf: [_buffer(place) for place in places] for leaf, places in groups.items()}
    for leaf, places in groups.items():
        _put(places, [buffer.to(dtype) for buffer in original[leaf]])
    needed = list(groups) if _runs(run) else []
    for leaf in groups:
        cast = [_buffer(place) for place in groups[leaf]]
        _put(groups[leaf], original[leaf])
        if leaf in needed and not _runs(run):
            _put(groups[leaf], cast)
        elif leaf in needed:
            needed.remove(leaf)
    return needed


def forward_pass(module: nn.Module, inputs: Any, device: str) -> Callable[[], Any]:
    """Return one forward pass on example inputs, or on two token ids if there are none."""
    if inputs is None:
        inputs = (torch.tensor([[0, 1]], device=device),)

    def run() -> Any:
        with torch.no_grad():
            return module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)

    return run


def _kept_in_float32(module: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return whether transformers would keep a parameter of this name in float32."""
    patterns = list(_patterns(module, dtype))
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _patterns(module: nn.Module, dtype: torch.dtype) -> Iterator[str]:
    names = {
        torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    }.get(dtype, ())
    for path, part in module.named_modules():
        for name in names:
            for kept in getattr(part, name, None) or ():
                yield rf"^{re.escape(path + '.') if path else ''}(.*\.)?{kept}(\.|$)"


def _runs(run: Callable[[], Any]) -> bool:
    try:
        run()
    except UNFIT:
        return False
    return True


def _buffer(place: _Place) -> torch.Tensor:
    owner, leaf = place
    buffer = owner._buffers[leaf]
    assert buffer is not None  # only places of buffers are collected
    return buffer


def _put(places: list[_Place], buffers: list[torch.Tensor]) -> None:
    for (owner, leaf), buffer in zip(places, buffers, strict=True):
        owner._buffers[leaf] = buffer
