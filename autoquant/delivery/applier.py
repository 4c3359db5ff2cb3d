"""Apply a plan to a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.experts import ExpertsWeight
from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.floats import original_format
from autoquant.candidates.joined import join
from autoquant.candidates.routed import RoutedWeight
from autoquant.candidates.routes import for_any_rows, route_words
from autoquant.delivery.kernel_check import OnKernel, check_kernels, ignore_kernel
from autoquant.delivery.rounding_inputs import Calibration, Windows
from autoquant.errors import CandidateError, ModelError, PlanError
from autoquant.events import (
    Listener,
    Notice,
    StageFinished,
    StageProgress,
    StageStarted,
    ignore,
)
from autoquant.models.copies import not_compiled, shallow_copy
from autoquant.models.loaded import device_of
from autoquant.models.shown import show_linears, shown_weight
from autoquant.models.streaming import brought, place_whole, stream_of
from autoquant.models.turned import is_turned
from autoquant.records import LayerChoice, Plan
from autoquant.runtime.prepare import prepare
from autoquant.solver.tied import shares

_RIGHT_MODEL = "give the model that was searched"


class Quantized:
    """Quantized weights of one model, kept from one plan to the next.

    Weights that both plans store in the same format are quantized only once. It holds no more than
    the weights of one plan.
    """

    def __init__(self) -> None:
        self._stored: dict[tuple[str, str], torch.Tensor] = {}

    def forget_all_but(self, plan: Plan) -> None:
        """Free the weights that the plan does not use."""
        used = {(layer.parameters[0], layer.format) for layer in plan.layers if not layer.joined}
        self._stored = {key: stored for key, stored in self._stored.items() if key in used}

    def store(
        self, layer: LayerChoice, weight: torch.Tensor, made: Calibration | None
    ) -> torch.Tensor:
        """Return the layer's weight in its format, quantized now unless the last plan did.

        Args:
            made: The weights that were rounded for their layers' inputs.
        """
        key = (layer.parameters[0], layer.format)
        if key in self._stored:
            return self._stored[key]
        fmt = get_format(layer.format)
        if fmt.needs_inputs and made is not None:
            stored = made.stored(layer.parameters[0], fmt)
        else:
            stored = fmt.store(weight)
        if not layer.joined:  # a joined weight is copied into memory shared with others
            self._stored[key] = stored
        return stored


def apply(
    plan: Plan,
    model: nn.Module,
    *,
    calibration: Windows | Calibration | None = None,
    listener: Listener = ignore,
    quantized: Quantized | None = None,
    on_kernel: OnKernel = ignore_kernel,
    streamed: nn.Module | None = None,
) -> nn.Module:
    """Quantize the weights of `model` as `autoquant.delivery.in_memory.apply` does, unchecked.

    Then each format, kernel and shape is checked once (see `autoquant.delivery.kernel_check`).

    Args:
        model: The model that was searched, loaded in the plan's dtype.
        calibration: The token ids of the search.
        quantized: Weights of the plan that was applied to the same model before.
        on_kernel: Takes what is checked next.
        streamed: The streamed module that `model` is a copy of. Each weight is brought to its
            device and quantized there, and then those that the plan leaves alone.

    Returns:
        The same module.

    Raises:
        PlanError: The plan needs a calibration.
        ModelError: The model lacks a layer of the plan, or has it with another shape or dtype. The
            model has not been changed.
        CandidateError: A weight could not be quantized as planned.
        KernelError: A kernel computes something else than its weight stores.
    """
    check_fits(plan, model)
    weights = {name for layer in plan.layers for name in layer.parameters}
    show_linears(model, weights | {_owner(name) for name in weights})
    made = rounded(plan, streamed or model, calibration)
    device = None if streamed is None else device_of(streamed)
    quantized = quantized or Quantized()
    quantized.forget_all_but(plan)
    listener(StageStarted("apply", len(plan.layers)))
    shared = shared_tables(plan)
    for done, layer in enumerate(plan.layers):
        listener(StageProgress("apply", done, layer.name))
        if layer.format != original_format(layer.shape.dtype) and layer.name not in shared:
            _replace(model, layer, quantized, made, device)
    for layer, linear in shared.values():
        share(model, layer, linear)
    for names in dict.fromkeys(layer.joined for layer in plan.layers if layer.joined):
        _join(model, [layer for layer in plan.layers if layer.name in names])
    if streamed is not None and (stream := stream_of(streamed)) is not None:
        place_whole(model, stream)
    prepare(model, kv_cache=plan.kv_cache)
    check_kernels(model, on_kernel)
    listener(StageFinished("apply", f"{len(plan.layers)} layers: {formats_text(plan)}"))
    for text in dict.fromkeys(filter(None, (_stand_ins(model, layer) for layer in plan.layers))):
        listener(Notice(text))
    return model


def applied(
    plan: Plan, model: nn.Module, calibration: Windows | Calibration | None, **options: Any
) -> nn.Module:
    """Return a copy of `model` with the plan applied. It shares all weights left alone.

    Args:
        options: As `apply` takes them.

    Raises what `apply` raises.
    """
    streamed = model if stream_of(model) is not None else None
    return apply(plan, shallow_copy(model), calibration=calibration, streamed=streamed, **options)


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters as stored, counting each tensor once."""
    unique = {id(parameter): parameter for parameter in module.parameters()}
    return sum(stored_bytes(parameter.data) for parameter in unique.values())


def _owner(parameter: str) -> str:
    """Return the name of a parameter's module."""
    return parameter.rpartition(".")[0]


def check_fits(plan: Plan, model: nn.Module) -> None:
    """Refuse a module that lacks a layer of the plan, or has it otherwise."""
    for layer in plan.layers:
        for name in layer.parameters:
            _check_parameter(model, name, layer)


def _check_parameter(model: nn.Module, name: str, layer: LayerChoice) -> None:
    """Refuse a parameter that is not the one the plan was made for."""
    other_model = "the plan is for another model"
    parameter = shown_weight(model, name)
    if parameter is None:
        missing = f"this one has no parameter {name}"
        raise ModelError(f"{other_model}: {missing}; {_RIGHT_MODEL}")
    shape, wanted = tuple(parameter.shape), layer.parameter_shape
    if stream_of(model) is not None and is_turned(model.get_submodule(_owner(name))):
        raise ModelError(
            f"{name} is kept the other way round in the model's files, which do not fit into"
            " memory here, and are turned there: apply the plan where they fit"
        )
    if shape != wanted:
        raise ModelError(f"{other_model}: {name} is {shape} here, not {wanted}; {_RIGHT_MODEL}")
    kind = str(parameter.dtype).removeprefix("torch.")
    if isinstance(parameter.data, RoutedWeight):
        kind = "already quantized"
    if kind != layer.shape.dtype:
        planned = f"the plan was made for {layer.shape.dtype}"
        raise ModelError(f"{name} is {kind}; {planned}: load the model that way")


def rounded(
    plan: Plan, model: nn.Module, calibration: Windows | Calibration | None
) -> Calibration | None:
    """Make the plan's weights that need a calibration, and return it, or None if none does.

    Raises:
        PlanError: There is no calibration.
        CandidateError: A weight cannot be made.
    """
    formats = {layer.parameters[0]: get_format(layer.format) for layer in plan.layers}
    wanted = {name: fmt for name, fmt in formats.items() if fmt.needs_inputs}
    if not wanted:
        return None
    if calibration is None:
        names = ", ".join(sorted({fmt.values for fmt in wanted.values()}))
        raise PlanError(
            f"plan {plan.plan_id} has weights rounded for their layers' inputs ({names}): "
            "give the text they were rounded for with calibration=study.calibration"
        )
    made = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    failed = made.prepare(model, {name: [fmt] for name, fmt in wanted.items()})
    for (name, format_id), reason in failed.items():
        raise CandidateError(f"{name} cannot be {format_id}: {reason}")
    return made


def quantized_weight(
    layer: LayerChoice,
    weight: torch.Tensor,
    made: Calibration | None,
    quantized: Quantized | None = None,
) -> torch.Tensor:
    """Return a layer's weight in its format, with its route.

    Args:
        weight: The unquantized one, on the device that it is to be on.
        made: The weights that were rounded for their layers' inputs.
    """
    fmt = get_format(layer.format)
    route = layer.route
    if not layer.is_table:
        route = for_any_rows(route, fmt, layer.shape, weight.device.type)
    straight = weight.transpose(-2, -1) if layer.turned else weight
    stored = (quantized or Quantized()).store(layer, straight.flatten(0, -2), made)
    if layer.experts > 1:
        return ExpertsWeight.of(stored, fmt, route, weight.dtype, layer.experts, layer.turned)
    return RoutedWeight.wrap(stored, fmt.id, route, weight.dtype)


def _replace(
    model: nn.Module,
    layer: LayerChoice,
    quantized: Quantized,
    made: Calibration | None,
    device: str | None,
) -> None:
    fmt = get_format(layer.format)
    weight = model.get_parameter(layer.parameters[0]).data
    if device is not None:
        weight = brought(weight, device)
    put(model, layer, quantized_weight(layer, weight, made, quantized))
    placed = model.get_parameter(layer.parameters[0]).data
    if not isinstance(placed, RoutedWeight) or type(placed.stored) is not fmt.tensor_type:
        raise ModelError(
            f"{layer.name} did not become {fmt.id}: its module puts another weight in place"
        )


def _stand_ins(model: nn.Module, layer: LayerChoice) -> str:
    """Return a note if the applied route differs from the plan's, else "".

    It does if a kernel supports only some numbers of rows.
    """
    weight = model.get_parameter(layer.parameters[0]).data
    if layer.is_table or not isinstance(weight, RoutedWeight) or weight.steps() == layer.route:
        return ""
    names = " and ".join(dict.fromkeys(step.kernel for step in layer.route))
    used = f"so what is used is {route_words(weight.steps())}"
    return f"{layer.format}: {names} cannot compute every number of rows, {used}"


def _join(model: nn.Module, layers: Sequence[LayerChoice]) -> None:
    """Store the layers' weights adjacently, so that they can be multiplied as one."""
    weights = [model.get_parameter(layer.parameters[0]).data for layer in layers]
    for layer, weight in zip(layers, join(weights), strict=True):
        put(model, layer, weight)


def shared_tables(plan: Plan) -> dict[str, tuple[LayerChoice, LayerChoice]]:
    """Return the quantized tables that share a linear's stored tensor, with that linear."""
    layers = {layer.name: layer for layer in plan.layers}
    return {
        layer.name: (layer, layers[layer.tied])
        for layer in plan.layers
        if layer.format != original_format(layer.shape.dtype)
        and layer.tied
        and shares(layer, layers.get(layer.tied))
    }


def share(model: nn.Module, table: LayerChoice, linear: LayerChoice) -> None:
    """Make a linear's quantized weight the table's, too: one parameter of both."""
    owner, _, leaf = linear.parameters[0].rpartition(".")
    weight = not_compiled(model.get_submodule(owner))._parameters[leaf]
    for name in table.parameters:
        owner, _, leaf = name.rpartition(".")
        not_compiled(model.get_submodule(owner))._parameters[leaf] = weight


def put(model: nn.Module, layer: LayerChoice, weight: torch.Tensor) -> None:
    """Make a tensor the layer's weight, under each of its names."""
    replacement = nn.Parameter(weight, requires_grad=False)
    for name in layer.parameters:
        owner, _, leaf = name.rpartition(".")
        not_compiled(model.get_submodule(owner))._parameters[leaf] = replacement


def formats_text(plan: Plan) -> str:
    """Return how many layers each format has, in words."""
    return ", ".join(f"{count} {name}" for name, count in plan.formats().items())
