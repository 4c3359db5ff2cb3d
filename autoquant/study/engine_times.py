"""What types of weights take in an inference engine, and a space with these times. No torch.

An engine is timed as a whole: its program tells what a request takes, and nothing of a layer. So
whole models are timed in which every layer that can has one type. What that changes is shared out
among the layers by the products that each computes in the phase. A plan of several types is
predicted to take the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoquant.engines import Engine, Refusal
from autoquant.engines.targets import PLAIN
from autoquant.errors import PlanError
from autoquant.records import LayerChoice, Numerics, Site, Workload, request_time
from autoquant.solver.space import SearchSpace
from autoquant.store import Store

_REFERENCE = "times in engines"
PhaseTimes = Mapping[str, float]
"""Milliseconds of one call of each phase of a workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeTimes:
    """A whole model in which every layer that can has one type.

    Attributes:
        layers: Names of those that have it. The others are unquantized.
    """

    phase_ms: PhaseTimes
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """What an engine takes for the requests of one study.

    Attributes:
        engine: Its name.
        version: As its program tells it.
        device: Key of the device that it ran on.
        original_ms: Of the unquantized model.
        types: By the target's name of a type, e.g. `Q8_0`.
    """

    engine: str
    version: str
    device: str
    original_ms: PhaseTimes
    types: Mapping[str, TypeTimes]

    def requests_ms(self, workload: Workload) -> dict[str, float]:
        """Return the milliseconds of a request with each type; `PLAIN` is the unquantized model."""
        calls = workload.calls()
        timed = {PLAIN: self.original_ms} | {n: each.phase_ms for n, each in self.types.items()}
        return {name: request_time(phases, calls) for name, phases in timed.items()}

    def are_of(self, device: str, workload: Workload, types: Sequence[str]) -> bool:
        """Check whether these are times of a device, and know all types."""
        phases = set(workload.calls())
        known = [
            self.original_ms,
            *(self.types[name].phase_ms for name in types if name in self.types),
        ]
        return (
            self.device == device
            and set(types) <= self.types.keys()
            and all(set(each) == phases for each in known)
        )


def known_times(store: Store, study_id: str, engine: str) -> EngineTimes | None:
    """Return the times in an engine that a study keeps, or None."""
    kept = _engines(store, study_id).get(engine)
    if kept is None:
        return None
    types = {
        name: TypeTimes(phase_ms=each["phase_ms"], layers=tuple(each["layers"]))
        for name, each in kept["types"].items()
    }
    return EngineTimes(
        engine=engine,
        version=kept["version"],
        device=kept["device"],
        original_ms=kept["original_ms"],
        types=types,
    )


def keep_times(store: Store, study_id: str, times: EngineTimes) -> None:
    """Keep times in an engine with a study, in place of earlier ones in it."""
    types = {
        name: {"phase_ms": dict(each.phase_ms), "layers": list(each.layers)}
        for name, each in times.types.items()
    }
    made = {
        "version": times.version,
        "device": times.device,
        "original_ms": dict(times.original_ms),
        "types": types,
    }
    engines = {**_engines(store, study_id), times.engine: made}
    store.put_reference(study_id, _REFERENCE, {"engines": engines})


def _engines(store: Store, study_id: str) -> dict[str, Any]:
    kept = store.references(study_id).get(_REFERENCE, {"engines": {}})
    return dict(kept["engines"])


def type_of(engine: Engine, choice: LayerChoice) -> str:
    """Return the target's name of what a choice is stored as, or `PLAIN`.

    Raises:
        PlanError: The target does not hold it.
    """
    numerics = Numerics.parse(choice.numerics)
    found = engine.target.scheme(numerics.values, numerics.activation, choice.shape)
    if isinstance(found, Refusal):
        raise PlanError(f"{engine.name} does not hold {choice.format}: {found}")
    return found.name


def types_of(engine: Engine, space: SearchSpace) -> list[str]:
    """Return the types that some layer of a space may have, without `PLAIN`."""
    found = dict.fromkeys(type_of(engine, each) for layer in space.options for each in layer)
    return [name for name in found if name != PLAIN]


def in_engine(
    space: SearchSpace, times: EngineTimes, engine: Engine, sites: Sequence[Site]
) -> SearchSpace:
    """Return a space whose layers take what the engine takes.

    A layer takes its part of the whole request: what is outside the layers is shared out, too. So
    only sums and differences mean something.

    Args:
        sites: The recorded ones of the study.
    """
    parts = _parts(space, sites)
    per_type: dict[str, Mapping[str, float]] = {PLAIN: times.original_ms}
    per_type |= {name: _as_if_all(times, each, parts) for name, each in times.types.items()}

    def timed(choice: LayerChoice) -> LayerChoice:
        whole_ms = per_type[type_of(engine, choice)]
        own = parts[choice.name]
        return replace(choice, latency_us={p: 1e3 * own[p] * ms for p, ms in whole_ms.items()})

    context = replace(
        space.context,
        rest_ms=0.0,
        original_request_ms=times.requests_ms(space.context.workload)[PLAIN],
    )
    options = [[timed(choice) for choice in layer] for layer in space.options]
    return replace(space, options=options, context=context)


def _parts(space: SearchSpace, sites: Sequence[Site]) -> dict[str, dict[str, float]]:
    """Return the part of all products of a phase that each layer computes, 0 to 1."""
    names = {layer[0].name for layer in space.options}
    products: dict[str, dict[str, float]] = {}
    for site in sites:
        if site.name in names:
            own = products.setdefault(site.name, dict.fromkeys(space.context.workload.calls(), 0.0))
            for use in site.uses:
                own[use.phase] += use.calls * use.m * site.shape.n * site.shape.k
    sums = {
        phase: sum(own[phase] for own in products.values()) or 1.0
        for phase in space.context.workload.calls()
    }
    return {
        name: {phase: value / sums[phase] for phase, value in own.items()}
        for name, own in products.items()
    }


def _as_if_all(
    times: EngineTimes, measured: TypeTimes, parts: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Return what a model would take if layers that cannot have a type changed as the others do."""
    found = {}
    for phase, original_ms in times.original_ms.items():
        covered = sum(parts[name][phase] for name in measured.layers if name in parts)
        change_ms = measured.phase_ms[phase] - original_ms
        found[phase] = max(original_ms + change_ms / covered, 0.0) if covered else original_ms
    return found
