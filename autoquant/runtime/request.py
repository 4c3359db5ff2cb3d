"""Time of one request, measured on the whole model: a plan and the unquantized model in turn."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from autoquant.devices.device import release_memory, synchronize
from autoquant.devices.load import HIGHEST_OTHER_LOAD, watch_load
from autoquant.errors import first_line
from autoquant.intervals import mean_interval
from autoquant.records import DISTURBED, Interval, request_time
from autoquant.runtime.compiled import Division
from autoquant.runtime.phases import Phases

WARM_UP_CALLS = 2
MAX_RELATIVE_ERROR = 0.1
_ROUNDS = 6
_FEWEST_ROUNDS = 3
_CALLS_PER_ROUND = 16
_ROUND_S = 0.1
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Median milliseconds of one call of each phase, of a plan and of the unquantized model timed in the same rounds.

    `rounds` has the pairs (plan, unquantized model) that these are medians of, phase by phase.
    """

    plan_ms: Mapping[str, float]
    original_ms: Mapping[str, float]
    note: str = ""
    rounds: tuple[tuple[Mapping[str, float], Mapping[str, float]], ...] = ()

    def request_ms(self, calls: Mapping[str, int]) -> tuple[float, float]:
        """Milliseconds of one request by the plan and by the unquantized model."""
        return request_time(self.plan_ms, calls), request_time(self.original_ms, calls)

    def ratio(self, calls: Mapping[str, int]) -> Interval:
        """Request time of the plan over that of the unquantized model, with its 95 % interval from the spread of the rounds."""
        plan_ms, original_ms = self.request_ms(calls)
        value = plan_ms / original_ms
        each = [request_time(plan, calls) / request_time(original, calls) for plan, original in self.rounds]
        half = (interval := mean_interval(each)).high - interval.value if each else math.inf
        return Interval(value=value, low=value - half, high=value + half)


class Timed(Protocol):
    """What can be timed: `run` does one call, of which `limit` may follow a `reset`."""

    def reset(self, phase: str) -> None: ...

    def run(self, phase: str) -> Any: ...

    def limit(self, phase: str) -> int: ...


class WrongResultError(Exception):
    """Compiled code computes something else than the same model does eagerly."""


def warm_up(phases: Phases) -> None:
    """Compile every phase, check what it computes, and run it until it has settled.

    Raises:
        WrongResultError: The compiled phase's output differs from the eager one's by more than rounding explains.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for phase in phases.workload.phases:
            phases.reset(phase.name)
            expected = phases.run_eager(phase.name).float()
            phases.reset(phase.name)
            difference = (phases.run(phase.name).float() - expected).norm()
            error = (difference / expected.norm().clamp(min=1e-30)).item()
            if not error <= MAX_RELATIVE_ERROR:  # NaN counts as wrong
                raise WrongResultError(
                    f"compiled {phase.name} is off by {error:.2g} (relative) from the same plan run eagerly"
                )
            for _ in range(WARM_UP_CALLS):
                phases.reset(phase.name)
                phases.run(phase.name)
            release_memory()  # what the compiler leaves behind, before the next phase is compiled


def make_warm(make: Callable[..., Phases], divisions: Sequence[Division]) -> tuple[Phases, str]:
    """Make phases and warm them up, by the first way to compile that works.

    Args:
        make: `make_phases` with all its arguments but `division`.
        divisions: The ways, in the order in which to try them.

    Returns:
        The phases, and which way it was and why, where it was not the first.

    Raises:
        WrongResultError: The model computes something else in the last way, too.
    """
    reason = ""
    for division in divisions:
        try:
            phases = make(division=division)
            warm_up(phases)
            return phases, f"{_COMPILED[division]}: {reason}" if reason else ""
        except Exception as error:
            if division == divisions[-1]:
                raise
            reason = reason or first_line(error, with_type=True)
    raise ValueError("there is no way to compile")


_COMPILED: dict[Division, str] = {
    "regions": "compiled in one piece, not part by part",
    "whole": "compiled whole, not block by block",
}


def time_requests(plan: Phases, original: Phases, device: str) -> RequestTimes:
    """Time both models, already warm, in alternating order, and take medians over rounds; see `time_in_turn`."""
    (of_original, of_plan), note = rounds_in_turn([original, plan], _names(original), device)
    return beside(of_plan, of_original, note)


def time_in_turn(models: Sequence[Phases], device: str) -> tuple[list[dict[str, float]], str]:
    """As `rounds_in_turn`, with the medians over rounds for each model."""
    rounds, note = rounds_in_turn(models, _names(models[0]), device)
    return [_medians(taken) for taken in rounds], note


def beside(plan: Sequence[Mapping[str, float]], original: Sequence[Mapping[str, float]], note: str) -> RequestTimes:
    """What the same rounds gave of a plan and of the unquantized model."""
    return RequestTimes(_medians(plan), _medians(original), note, tuple(zip(plan, original, strict=True)))


def rounds_in_turn(
    models: Sequence[Timed], names: Sequence[str], device: str, limit_s: float = math.inf
) -> tuple[list[list[dict[str, float]]], str]:
    """Time models of one workload, already warm, round after round, each round beginning with another one.

    Repeated while the machine is busy with something else.

    Args:
        names: Of the phases.
        limit_s: Begin no further round, and do not repeat, after that time.

    Returns:
        For each model and round milliseconds of one call of each phase, and a note where the machine stayed busy.
    """
    until = time.perf_counter() + limit_s
    for attempt in range(_ATTEMPTS):
        watch = watch_load(device)
        times = _rounds_in_turn(models, names, device, until)
        share = watch.share()
        if share <= HIGHEST_OTHER_LOAD:
            return times, ""
        if time.perf_counter() > until:
            break
        time.sleep(attempt)
    return times, f"{DISTURBED} {share:.0%} of the machine: `autoquant bench` times it again"


def _rounds_in_turn(
    models: Sequence[Timed], names: Sequence[str], device: str, until: float
) -> list[list[dict[str, float]]]:
    samples: list[list[dict[str, float]]] = [[] for _ in models]
    pairs = list(zip(models, samples, strict=True))
    for number in range(_ROUNDS):
        if number >= _FEWEST_ROUNDS and time.perf_counter() > until:
            break
        for _, taken in pairs:
            taken.append({})
        first = number % len(pairs)
        for name in names:
            for phases, taken in pairs[first:] + pairs[:first]:
                taken[-1][name] = _sample(phases, name, device)
    return samples


def _names(phases: Phases) -> list[str]:
    return [phase.name for phase in phases.workload.phases]


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(taken[name] for taken in rounds) for name in rounds[0]}


def _sample(phases: Timed, name: str, device: str) -> float:
    """Median milliseconds of several calls in a row."""
    calls: list[float] = []
    started = time.perf_counter()
    left = 0
    while len(calls) < _CALLS_PER_ROUND and time.perf_counter() - started < _ROUND_S:
        if left == 0:
            phases.reset(name)
            left = phases.limit(name)
        synchronize(device)
        start = time.perf_counter()
        phases.run(name)
        synchronize(device)
        calls.append((time.perf_counter() - start) * 1e3)
        left -= 1
    return statistics.median(calls)
