"""What a target makes of each layer of a plan, and what engines lack for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.formats.floats import original_format
from autoquant.delivery.applier import shared_tables
from autoquant.delivery.targets.base import ExportedLayer
from autoquant.engines import (
    ENGINES,
    Activations,
    Engine,
    Refusal,
    Scheme,
    Target,
    Values,
    rounded_activation,
)
from autoquant.engines.targets import PLAIN
from autoquant.engines.values import A16
from autoquant.errors import PlanError
from autoquant.models.quiet import some
from autoquant.models.turned import turned_names
from autoquant.records import LayerChoice, Plan
from autoquant.solver.served import NOT_EXPORTABLE, is_exportable

_WEIGHT = ".weight"
_EXCEPT = ", or as one tensor with a head in the same format"


def held_layers(
    plan: Plan, target: Target, mixed: Activations = "rounded"
) -> dict[str, ExportedLayer]:
    """Return how a target holds each quantized layer, by the name of its weight.

    Args:
        mixed: What is taken where kernels of a route round the activation and others do not.

    Raises:
        PlanError: It cannot hold some. All are named, by the numbers that they have. Or no layer
            is quantized, and the target is of no use for that.
    """
    held: dict[str, ExportedLayer] = {}
    refused: dict[tuple[str, Refusal], list[str]] = {}
    shared = shared_tables(plan) if target.ties else {}
    for layer in plan.layers:
        if layer.name in shared:
            continue  # the tensor of its linear is the table's, too
        values = get_format(layer.format).values
        found = scheme_of(layer, target, mixed)
        if isinstance(found, Refusal):
            refused.setdefault((values, found), []).append(layer.name)
        elif found.name != PLAIN:
            name = layer.parameters[0]
            owner = name.removesuffix(_WEIGHT)
            activation = activation_of(layer, mixed)
            held[name] = ExportedLayer(owner, Values.parse(values), found, layer, activation)
    if refused:
        raise PlanError(_all_refused(refused, target))
    if not held and not target.converts:
        raise PlanError(f"plan {plan.plan_id} quantizes nothing: serve the model itself")
    return held


def scheme_of(
    layer: LayerChoice, target: Target, mixed: Activations = "rounded"
) -> Scheme | Refusal:
    """Return how a target holds a layer, or why it cannot."""
    fmt = get_format(layer.format)
    if layer.is_table and layer.format != original_format(layer.shape.dtype):
        return Refusal(
            f"{target.name} holds embeddings unquantized{_EXCEPT if target.ties else ''}"
        )
    if layer.is_table:
        return target.scheme(fmt.values, A16, layer.shape)
    found = target.scheme(fmt.values, activation_of(layer, mixed), layer.shape)
    if isinstance(found, Refusal) or found.name == PLAIN:
        return found
    if fmt.neutral is None:
        return Refusal(f"the format {fmt.id} gives its numbers to no other tool (Format.neutral)")
    if not is_exportable(layer.parameters):
        return Refusal(NOT_EXPORTABLE)
    return found


def check_linears(module: nn.Module, layers: Iterable[ExportedLayer]) -> None:
    """Refuse quantized layers of other modules than `nn.Linear`, which engines leave alone.

    Raises:
        PlanError: There are some, e.g. routers of experts. Or the model's own files have weights
            the other way round, which engines turn by the names of layers.
    """
    if turned := turned_names(module):
        raise PlanError(
            f"files of {type(module).__name__} have {some(turned)} as [k, n], and what engines make"
            " of them once quantized is not known here: use `autoquant apply`"
        )
    linears = {
        name
        for name, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, nn.Linear)
    }
    others = [layer.name for layer in layers if layer.name not in linears]
    if others:
        raise PlanError(
            f"engines quantize linear modules only, and {some(others)} are none: search with --keep"
            " for these layers"
        )


def activation_of(layer: LayerChoice, mixed: Activations = "rounded") -> str:
    """Return the one way to round the activation that a layer's route is exported with."""
    fmt = get_format(layer.format)
    return rounded_activation((fmt.kernel(step.kernel).numerics for step in layer.route), mixed)


def _all_refused(refused: Mapping[tuple[str, Refusal], list[str]], target: Target) -> str:
    each = "; ".join(
        f"{_count(names)} {values} ({some(names, 1)}): {refusal}"
        for (values, refusal), names in refused.items()
    )
    readers = [engine.name for engine in ENGINES.values() if engine.target is target]
    search = f"Search or solve with --for {readers[0]}, round" if readers else "Round"
    return (
        f"{target.name} cannot hold this plan. {each}. {search} these layers anew with"
        " --requantize, or apply the plan with `autoquant apply`"
    )


def _count(names: list[str]) -> str:
    return "1 layer has" if len(names) == 1 else f"{len(names)} layers have"


def rounding_notes(layers: Iterable[ExportedLayer]) -> list[str]:
    """Say where activations are rounded otherwise than by every kernel of the plan."""
    changed: dict[tuple[str, str, str], int] = {}
    for layer in layers:
        fmt = get_format(layer.choice.format)
        used = sorted({fmt.kernel(step.kernel).numerics for step in layer.choice.route})
        if used != [layer.scheme.activation]:
            why = ""
            if A16 in used and len(used) > 1 and layer.scheme.activation == layer.activation:
                other = "rounded rounds" if layer.activation == A16 else "a16 does not round"
                why = f" (--activations {other} it)"
            key = " and ".join(used), layer.scheme.activation, why
            changed[key] = changed.get(key, 0) + 1
    return [
        f"{count} layers round the activation as {used} in the plan, and as {exported} here{why}"
        for (used, exported, why), count in changed.items()
    ]


def engine_notes(target: Target, layers: Mapping[str, ExportedLayer], plan: Plan) -> list[str]:
    """Say which engines that read the target cannot take these layers, and why."""
    notes = []
    for engine in ENGINES.values():
        if reading := engine.reading(target):
            notes += lacking_notes(reading, layers, plan, [None, *reading.limits])
    return notes


def lacking_notes(
    engine: Engine,
    held: Mapping[str, ExportedLayer],
    plan: Plan,
    devices: Sequence[str | None],
) -> list[str]:
    """Say what of a plan an engine cannot take, and why, a line each; empty if it takes all.

    Args:
        held: What `held_layers` returned.
        devices: Kinds of devices that it is served on; None is any.
    """
    layers = {layer.name: layer for layer in held.values()}
    groups = engine.fused(layer.name for layer in plan.layers)
    mixed = [group for group in groups if len({_form(layers.get(name)) for name in group}) > 1]
    notes = []
    if mixed:
        parts = ", ".join(name.rpartition(".")[2] for name in mixed[0])
        notes.append(
            f"{engine.name} cannot load it: it computes layers such as {parts} as one, and"
            f" {len(mixed)} of {len(groups)} such groups have several schemes here (first:"
            f" {mixed[0][0].rpartition('.')[0]}); search or solve with --for {engine.name}"
        )
    fused = {name for group in groups for name in group}
    known: set[str] = set()
    for device in devices:
        refused: dict[str, list[str]] = {}
        for layer in layers.values():
            reason = _refused(engine, layer, layer.name in fused, device)
            if reason and reason not in known:
                refused.setdefault(reason, []).append(layer.name)
        known.update(refused)
        notes += [
            f"{engine.name} cannot compute {len(found)} layers ({some(found, 1)}): {reason}"
            for reason, found in refused.items()
        ]
    return notes


def _form(layer: ExportedLayer | None) -> tuple[str, int | None, Scheme] | None:
    """Return what has to be the same for layers that are computed as one."""
    return (layer.values.family, layer.values.group, layer.scheme) if layer else None


def _refused(engine: Engine, layer: ExportedLayer, fused: bool, device: str | None) -> str | None:
    choice = layer.choice
    return engine.refuses(
        str(layer.values), layer.activation, choice.shape, fused=fused, device=device
    )
