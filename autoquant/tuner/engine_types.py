"""What to time in an engine to know its types, and the times that its runs give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoquant.candidates import get_format
from autoquant.engines import Engine, Values
from autoquant.records import LayerChoice, Numerics, Plan, Workload
from autoquant.solver.planning import make_plan
from autoquant.solver.space import SearchSpace
from autoquant.study.engine_times import EngineTimes, TypeTimes, type_of
from autoquant.tuner.engine_bench import EngineRuns
from autoquant.tuner.timed_engines import FIRST, REQUEST, Times

_LEAST_MS = 1e-3
"""Noise may make a prompt take longer than a whole request."""


def plan_of_type(space: SearchSpace, engine: Engine, name: str) -> Plan:
    """Return a plan in which every layer that can has one type. Its speed is all that counts.

    So weights are rounded to nearest, which takes no calibration. Other layers stay unquantized, or
    get their first option if a constraint bars that.
    """
    chosen = []
    for layer in space.options:
        of_type = next((each for each in layer if type_of(engine, each) == name), None)
        unquantized = next((each for each in layer if is_plain(each)), layer[0])
        chosen.append(_to_nearest(of_type) if of_type else unquantized)
    return make_plan(chosen, name, "uniform", space.context)


def _to_nearest(choice: LayerChoice) -> LayerChoice:
    nearest = get_format(get_format(choice.format).timed_as)
    numerics = Numerics(nearest.values, Numerics.parse(choice.numerics).activation)
    return replace(choice, format=nearest.id, numerics=str(numerics))


def is_plain(layer: LayerChoice) -> bool:
    """Check whether a layer is left unquantized."""
    return Values.parse(layer.format).is_plain


def times_of(
    engine: str, device: str, plans: Mapping[str, Plan], runs: EngineRuns, workload: Workload
) -> EngineTimes:
    """Return the times of types.

    Args:
        device: Key of the device.
        plans: By type.
        runs: Of the unquantized model, and then of these plans.
    """
    original, *others = runs.taken
    types = {
        name: TypeTimes(
            phase_ms=_least_ms(taken, workload),
            layers=tuple(layer.name for layer in plan.layers if not is_plain(layer)),
        )
        for (name, plan), taken in zip(plans.items(), others, strict=True)
    }
    return EngineTimes(
        engine=engine,
        version=runs.version,
        device=device,
        original_ms=_least_ms(original, workload),
        types=types,
    )


def _least_ms(taken: Sequence[Times], workload: Workload) -> dict[str, float]:
    """Return the least milliseconds of one call of each phase over all rounds.

    Other programs only ever add to a time. All tokens after the first are decoded, so these calls
    add up to a request.
    """
    calls = workload.calls()
    first = min(times[FIRST] for times in taken)
    request = min(times[REQUEST] for times in taken)
    if "prefill" not in calls:
        return {"decode": request / calls["decode"]}
    if "decode" not in calls:
        return {"prefill": request}
    rest = min(times[REQUEST] - times[FIRST] for times in taken)
    return {"prefill": first, "decode": max(rest, _LEAST_MS) / calls["decode"]}
