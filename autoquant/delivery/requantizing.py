"""Change a plan to the nearest one that a target holds exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoquant.candidates import Format, get_format, known_formats
from autoquant.candidates.base import A16
from autoquant.candidates.formats.floats import original_format
from autoquant.delivery.applier import shared_tables
from autoquant.delivery.held import activation_of, scheme_of
from autoquant.engines import Activations, Refusal, Target
from autoquant.records import LOOKUP, LayerChoice, Plan, RouteStep, content_key

_ROWS = (1, 64)


@dataclass(frozen=True, slots=True)
class Requantized:
    """A plan that a target holds, and what was changed for it.

    Attributes:
        changes: How many layers were changed, by (values of the plan, values here, why). Values
            here are the model's dtype where the layer is left unquantized.
    """

    plan: Plan
    changes: Mapping[tuple[str, str, str], int]


def requantized(
    plan: Plan, target: Target, device_type: str, mixed: Activations = "rounded"
) -> Requantized:
    """Return a plan with the nearest values that a target holds, and all else as it was.

    The weights are rounded anew from the unquantized ones. A layer for which the target names no
    values, or none that can be made here, is left unquantized. A plan that is held is the same.

    Args:
        device_type: Kind of device that the plan is applied on.
        mixed: What is taken where kernels of a route round the activation and others do not.
    """
    changes: dict[tuple[str, str, str], int] = {}
    changed: dict[str, LayerChoice] = {}
    shared = shared_tables(plan)
    for layer in plan.layers:
        found = scheme_of(layer, target, mixed)
        if not isinstance(found, Refusal) or (target.ties and layer.name in shared):
            continue
        made = _nearest(layer, found.nearest, device_type) or _unquantized(layer)
        changed[layer.name] = made
        key = get_format(layer.format).values, get_format(made.format).values, found.reason
        changes[key] = changes.get(key, 0) + 1
    if not changed:
        return Requantized(plan, {})
    layers = [changed.get(layer.name, layer) for layer in plan.layers]
    apart = {name for layer in plan.layers if layer.name in changed for name in layer.joined}
    layers = [replace(each, joined=()) if each.name in apart else each for each in layers]
    new = replace(
        plan,
        plan_id=content_key([plan.plan_id, target.name, [each.format for each in layers]], 8),
        label=f"{plan.label}, rounded anew for {target.name}",
        layers=tuple(layers),
    )
    return Requantized(new, changes)


def _nearest(layer: LayerChoice, values: str, device_type: str) -> LayerChoice | None:
    """Return the layer with other values, or None if no format here has them."""
    wanted = {activation_of(layer), A16}
    for fmt in known_formats().values():
        if fmt.values != values or fmt.neutral is None:
            continue
        kernels = [each for each in fmt.kernels if each.numerics in wanted]
        kernels.sort(key=lambda kernel: kernel.numerics == A16)
        for kernel in kernels:
            if _computes(fmt, kernel.id, layer, device_type):
                return _with(layer, fmt, kernel.id)
    return None


def _computes(fmt: Format, kernel: str, layer: LayerChoice, device_type: str) -> bool:
    return all(
        fmt.unsupported_reason(fmt.kernel(kernel), layer.shape, m, device_type) is None
        for m in _ROWS
    )


def _unquantized(layer: LayerChoice) -> LayerChoice:
    fmt = get_format(original_format(layer.shape.dtype))
    return _with(layer, fmt, LOOKUP if layer.is_table else fmt.kernels[0].id)


def _with(layer: LayerChoice, fmt: Format, kernel: str) -> LayerChoice:
    return replace(
        layer,
        format=fmt.id,
        route=(RouteStep(upper_m=None, kernel=kernel),),
        numerics=f"{fmt.values}+{fmt.kernel(kernel).numerics}",
    )
