"""A plan applied from files to files, with one layer at a time in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.floats import original_format
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery import checkpoint
from autoquant.delivery.applier import (
    check_fits,
    formats_text,
    put,
    quantized_weight,
    rounded,
    share,
    shared_tables,
)
from autoquant.delivery.kernel_check import KernelChecks
from autoquant.delivery.rounding_inputs import Windows
from autoquant.events import Listener, StageFinished, StageProgress, StageStarted
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy
from autoquant.models.factory import tied_names
from autoquant.models.streaming import brought, on_meta
from autoquant.records import LayerChoice, Plan


def write_layers(
    plan: Plan,
    loaded: LoadedModel,
    folder: Path,
    *,
    calibration: Windows | None,
    listener: Listener,
) -> int:
    """Quantize a model layer by layer, and write a checkpoint of it into an empty folder.

    Each file is read back, and its tensors are compared with those in memory, bit for bit. Kernels
    are checked as `autoquant.delivery.applier.apply` checks them.

    Args:
        loaded: A streamed model, which stays as it is.

    Returns:
        The bytes of all parameters as stored.

    Raises what `apply` raises, and CheckpointError for a file that is not what was written.
    """
    check_fits(plan, loaded.module)
    listener(StageStarted("apply", len(plan.layers)))
    layers = Layers(plan, loaded, calibration, listener)
    shape = shape_of(plan, loaded.module)
    ties = tied_names(shape)
    checkpoint.write_beside(loaded, plan, folder)
    about = checkpoint.describe(plan, asdict(loaded.source), loaded.device)
    checkpoint.write_tensors(layers.tensors(shape, ties), ties, about, folder, check=True)
    listener(StageFinished("apply", f"{len(plan.layers)} layers: {formats_text(plan)}"))
    return layers.parameter_bytes


def shape_of(plan: Plan, module: nn.Module) -> nn.Module:
    """Return a copy without values that has the names and ties of the quantized model."""
    shape = on_meta(shallow_copy(module))
    for layer in plan.layers:
        if layer.format != original_format(layer.shape.dtype):
            put(shape, layer, torch.empty(layer.parameter_shape, device="meta"))
    for table, linear in shared_tables(plan).values():
        share(shape, table, linear)
    return shape


class Layers:
    """Makes the tensors of a quantized model one by one.

    Attributes:
        parameter_bytes: Of the parameters made so far.
    """

    def __init__(
        self, plan: Plan, loaded: LoadedModel, calibration: Windows | None, listener: Listener
    ) -> None:
        self.parameter_bytes = 0
        self._loaded = loaded
        self._listener = listener
        self._rounded = rounded(plan, loaded.module, calibration)
        self._layers = {
            name: layer
            for layer in plan.layers
            if layer.format != original_format(layer.shape.dtype)
            for name in layer.parameters
        }
        for table, linear in shared_tables(plan).values():
            self._layers |= dict.fromkeys(table.parameters, linear)
        self._checks = KernelChecks(loaded.device)
        self._done = 0

    def tensors(
        self, shape: nn.Module, ties: list[list[str]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the model by name, each as it is made."""
        stream = self._loaded.stream
        assert stream is not None
        stream.let_go()
        aliases = {name for group in ties for name in group[1:]}
        for name in checkpoint.named_tensors(shape):
            if name in aliases:
                continue
            owner, _, leaf = name.rpartition(".")
            part = self._loaded.module.get_submodule(owner)
            if leaf in part._buffers:
                buffer = part._buffers[leaf]
                assert buffer is not None  # named buffers have values
                yield name, buffer.cpu()
                continue
            tensor = part.get_parameter(leaf).data
            layer = self._layers.get(name)
            tensor = tensor.cpu() if layer is None else self._quantized(name, layer, tensor)
            self.parameter_bytes += stored_bytes(tensor)
            yield name, tensor

    def _quantized(self, name: str, layer: LayerChoice, weight: torch.Tensor) -> torch.Tensor:
        self._listener(StageProgress("apply", self._done, layer.name))
        self._done += 1
        made = quantized_weight(layer, brought(weight, self._loaded.device), self._rounded)
        assert isinstance(made, RoutedWeight)
        if layer.is_table:
            self._checks.check_table(layer.name, made)
        else:
            self._checks.check(name.removesuffix(".weight"), made)
        return made
