"""What the engine of a search takes: candidates first, and the layers once they are recorded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from autoquant.candidates import Candidate, get_format, select
from autoquant.delivery.targets import writer
from autoquant.engines import Target, engine
from autoquant.errors import CandidateError, ModelError, PlanError
from autoquant.models import LoadedModel
from autoquant.records import Site
from autoquant.solver.constraints import Bound, bind
from autoquant.solver.served import (
    DIVISIBLE,
    NOT_EXPORTABLE,
    Served,
    is_exportable,
    refusal_lines,
)
from autoquant.tuner.choices import Facts
from autoquant.tuner.request import SettledRequest

_REPEATED = "a {target} repeats scales for each {block} weights, so groups of {block} are as small"
_SYMMETRIC, _ASYMMETRIC = "int4s-", "int4-"


def served_candidates(
    name: str, globs: Sequence[str], device_type: str
) -> tuple[list[Candidate], dict[str, str]]:
    """Return the candidates that an engine holds, and why not the others that the device can use.

    The glob `*` also chooses symmetric int4 in the layouts that asymmetric int4 has by default, and
    what the target tries. It leaves out groups whose scales the target's files repeat.

    Raises:
        ConstraintError: There is no such engine.
        CandidateError: A glob matches nothing, or nothing that the engine holds.
    """
    served = Served.of(name, device_type, ())
    chosen = {each.id for each in select(globs, device_type)}
    every = select(["*"])
    why = {each.id: _refusal(served, each) for each in every}
    if "*" in globs:
        named = {each.id for each in select([g for g in globs if g != "*"], device_type)}
        chosen |= {
            _SYMMETRIC + c.removeprefix(_ASYMMETRIC) for c in chosen if c.startswith(_ASYMMETRIC)
        }
        target = served.engine.target
        wider = {each.id for each in every if target.repeats_scales(each.format.values)} - named
        why |= {
            each: _REPEATED.format(target=target.name, block=target.block)
            for each in wider & chosen
            if not why[each]
        }
        chosen |= {each.id for each in every if _is_tried(each, target, chosen)}
    asked = [each for each in every if each.id in chosen]
    barren = [glob for glob in globs if glob != "*" and all(why[c.id] for c in select([glob]))]
    if barren:
        lines = refusal_lines(_by_name(select(barren), why))
        raise CandidateError(f"--candidates: {name} cannot hold {'; '.join(lines)}")
    usable = [each for each in asked if _is_usable(each, device_type)]
    return [each for each in asked if not why[each.id]], _by_name(usable, why)


def _is_tried(candidate: Candidate, target: Target, chosen: Collection[str]) -> bool:
    """Check whether a search for a target tries a candidate beside the usual ones.

    Another rounding of what is chosen is tried in the same layouts. What no search tries unasked,
    whatever its rounding, has one layout.
    """
    fmt = candidate.format
    if fmt.values not in target.tries:
        return False
    if not fmt.rounds:
        return True
    nearest = get_format(fmt.rounds)
    usual = any(each.partition("/")[0] == nearest.values for each in chosen)
    return f"{nearest.id}/{candidate.kernel.id}" in chosen or not usual


def _refusal(served: Served, candidate: Candidate) -> str | None:
    if candidate.format.neutral is None:
        return "the format gives its numbers to no other tool (Format.neutral)"
    return served.refuses("", candidate.format.values, candidate.kernel.numerics, DIVISIBLE)


def _is_usable(candidate: Candidate, device_type: str) -> bool:
    return any(candidate.unsupported_reason(DIVISIBLE, m, device_type) is None for m in (1, 64))


def _by_name(candidates: Sequence[Candidate], why: Mapping[str, str | None]) -> dict[str, str]:
    """Return why candidates are refused, by values; with the activation if other kernels do."""
    some = {each.format.values for each in candidates if not why[each.id]}
    found = {}
    for each in candidates:
        values, reason = each.format.values, why[each.id]
        if reason:
            found[f"{values}+{each.kernel.numerics}" if values in some else values] = reason
    return found


def check_model(name: str, loaded: LoadedModel) -> None:
    """Refuse a model that cannot be exported for an engine.

    Raises:
        ModelError: It is one.
    """
    try:
        exporter = writer(engine(name).target.name)
    except PlanError:
        return  # nothing writes the target yet, or knows its models
    try:
        exporter.check(loaded)
    except PlanError as error:
        raise ModelError(f"--for {name}: {error}; or leave out --for") from error


def facts_for(name: str | None, facts: Facts) -> Facts:
    """Return the facts of formats, with the bytes that the engine's files have.

    Args:
        name: Of the engine; without one the facts stay as they are.
    """
    if name is None:
        return facts
    counted = {}
    for (format_id, shape), each in facts.items():
        size = engine(name).target.stored_bytes(format_id.partition("/")[0], shape)
        counted[format_id, shape] = each if size is None else replace(each, memory_bytes=size)
    return counted


def bind_sites(settled: SettledRequest, sites: Sequence[Site]) -> Bound:
    """Find the layers that constraints are about.

    Raises:
        ConstraintError: A pattern matches nothing, or constraints contradict one another.
    """
    candidates, constraints = settled.candidates, settled.request.constraints
    served = None
    if constraints.engine is not None:
        left_alone = dict(_left_alone(settled.loaded.module, sites))
        names = [site.name for site in sites]
        served = Served.of(constraints.engine, settled.hardware.type, names, left_alone)
    numerics = {each.id: each.kernel.numerics for each in candidates}
    return bind(constraints, sites, numerics, candidates[0].format.id, served)


def _left_alone(module: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, str]]:
    """Yield the layers that engines take unquantized only, with the reason."""
    modules = dict(module.named_modules())
    for site in sites:
        found = modules.get(site.name)
        if not is_exportable(site.parameters):
            yield site.name, NOT_EXPORTABLE
        elif not isinstance(found, nn.Linear):
            yield site.name, f"its module is a {type(found).__name__}, not a linear"
