"""What an inference engine leaves of a finished search. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from autoquant.engines import Target
from autoquant.engines import engine as find_engine
from autoquant.errors import PlanError
from autoquant.records import LayerChoice, Numerics
from autoquant.solver.constraints import Bound
from autoquant.solver.served import NOT_EXPORTABLE, TABLE, Served, is_exportable, refusal_lines
from autoquant.solver.space import SearchSpace, complete

Refusals = Mapping[str, Mapping[str, str]]
"""By layer and numerics, why an engine cannot compute the layer so."""


def for_engine(space: SearchSpace, engine: str, device_type: str) -> tuple[SearchSpace, list[str]]:
    """Return the part of a space that an engine holds exactly, and what that leaves out, in words.

    Raises:
        ConstraintError: There is no such engine, or layers that it computes as one have nothing in
            common.
        PlanError: Nothing that it holds was scored, for a layer that must be quantized or for all.
    """
    left_alone = {
        layer[0].name: NOT_EXPORTABLE
        for layer in space.options
        if not is_exportable(layer[0].parameters)
    } | {layer[0].name: TABLE for layer in space.options if layer[0].is_table}
    names = [layer[0].name for layer in space.options]
    served = Served.of(engine, device_type, names, left_alone)
    kept: list[list[LayerChoice]] = []
    refused: dict[str, dict[str, str]] = {}
    for name, layer in zip(names, space.options, strict=True):
        refused[name] = {c.numerics: why for c in layer if (why := _refusal(served, c))}
        kept.append([choice for choice in layer if choice.numerics not in refused[name]])
    _check_left(kept, refused, served)
    bound = space.context.bound
    groups = tuple(dict.fromkeys((*bound.groups, *served.groups)))
    bound = Bound(groups, served.reasons(bound.reasons))
    options = complete(bound.narrowed(kept))
    context = replace(space.context, bound=bound)
    return replace(space, options=options, context=context), list(_notes(options, refused, served))


def as_stored(space: SearchSpace, engine: str, *, one_head: bool = False) -> SearchSpace:
    """Return a space whose layers take the bytes that the engine's files have for them.

    Where the files have what the plan has, nothing changes.

    Args:
        one_head: A quantized head that is tied to the embedding stands for both. Otherwise the
            unquantized weight is kept beside it, as in every plan.
    """
    target = find_engine(engine).target
    options = [_stored(layer, target, one_head) for layer in space.options]
    return replace(space, options=options)


def memory_notes(engine: str, searched_for: str | None, *, one_head: bool) -> list[str]:
    """Say which bytes are counted, if they are not those that a plan takes in autoquant."""
    target = find_engine(engine).target
    counted = f"for {engine}: memory is that of the weights as --to"
    head = ", a tied head once for both" if one_head else ""
    if target.stores:
        return [f"{counted} {target.name} writes them{head}"]
    searched = None if searched_for is None else find_engine(searched_for).target
    if searched is None or searched is target or not searched.stores:
        return []
    return [f"{counted} {searched.name} writes them, which the search was for"]


def _stored(layer: Sequence[LayerChoice], target: Target, one_head: bool) -> list[LayerChoice]:
    if layer[0].is_table:  # what is left of one is unquantized; a head that is quantized may do
        once = one_head and layer[0].tied
        return [replace(each, memory_bytes=0) if once else each for each in layer]
    shape = layer[0].shape
    original_bytes = shape.n * shape.k * (4 if shape.dtype == "float32" else 2)
    quantized = [choice for choice in layer if _is_quantized(choice)]
    # More than the unquantized weight takes: that is kept for another use, and counted with each.
    kept = all(choice.memory_bytes > original_bytes for choice in quantized)
    kept_bytes = original_bytes if kept else 0
    found = {}
    for choice in quantized:
        size = target.stored_bytes(choice.format.partition("/")[0], shape)
        own_bytes = choice.memory_bytes - kept_bytes if size is None else size
        found[id(choice)] = own_bytes + (0 if one_head else kept_bytes)
    return [
        replace(choice, memory_bytes=found.get(id(choice), choice.memory_bytes)) for choice in layer
    ]


def _refusal(served: Served, choice: LayerChoice) -> str | None:
    numerics = Numerics.parse(choice.numerics)
    return served.refuses(choice.name, numerics.values, numerics.activation, choice.shape)


def _check_left(kept: Sequence[Sequence[LayerChoice]], refused: Refusals, served: Served) -> None:
    engine = served.engine.name
    again = f"run the same search with --for {engine}, which tries what it holds"
    nothing = [name for (name, why), layer in zip(refused.items(), kept, strict=True) if not layer]
    if nothing:
        why = "; ".join(refusal_lines(refused[nothing[0]]))
        raise PlanError(
            f"no plan is for {engine}: it holds nothing that was searched for {nothing[0]}"
            f"{f' and {len(nothing) - 1} more' if nothing[1:] else ''} ({why}): {again}"
        )
    if not any(_is_quantized(choice) for layer in kept for choice in layer):
        searched = {name: why for layer in refused.values() for name, why in layer.items()}
        lines = "; ".join(refusal_lines(searched)) or "nothing was quantized"
        raise PlanError(
            f"no plan is for {engine}: it holds nothing that was searched ({lines}): {again}"
        )


def _notes(
    options: Sequence[Sequence[LayerChoice]], refused: Refusals, served: Served
) -> Iterator[str]:
    """Say what is left out everywhere, and which layers have to stay unquantized."""
    engine = served.engine.name
    searched = {name: why for layer in refused.values() for name, why in layer.items()}
    for line in refusal_lines(searched):
        yield f"for {engine}: left out {line}"
    alone = [layer[0].name for layer in options if not any(map(_is_quantized, layer))]
    if alone:
        more = f" and {len(alone) - 1} more" if alone[1:] else ""
        yield (
            f"for {engine}: nothing else is left for {alone[0]}{more}: unquantized; a search with"
            f" --for {engine} tries what it holds"
        )


def _is_quantized(choice: LayerChoice) -> bool:
    return choice.numerics.partition("+")[0] != choice.shape.dtype
