"""What a report says first: use this plan, or leave the model as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoquant.records import Workload
from autoquant.report import units
from autoquant.report.html.points import PlanPoint
from autoquant.report.words import (
    NOT_RUN,
    as_run_lines,
    increase_words,
    limits_words,
    loop_words,
    measure_words,
    refused_lines,
    times_words,
)
from autoquant.store import StudyFacts


@dataclass(frozen=True, slots=True)
class Tile:
    """One number, large, with what it is compared with."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A headline, sentences below it, and the numbers that it rests on (none where nothing is recommended)."""

    headline: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...] = ()


def verdict(points: Sequence[PlanPoint], facts: StudyFacts) -> Verdict:
    """The recommended plan in a sentence, or why there is none."""
    unfinished = (
        ()
        if facts.complete
        else ("This search has not come to its end: more plans may be proven.",)
    )
    limits = limits_words(facts.limits)
    point = next((point for point in points if point.row["recommended"]), None)
    original = next((point for point in points if point.at.is_unquantized), None)
    if point is None:
        return Verdict(
            "No plan can be recommended.",
            (f"No proven plan is within the limits ({limits}).", *unfinished),
        )
    if point is original:
        other = "smaller" if facts.limits.get("minimize") == "memory" else "faster"
        if refused := refused_lines([point.row for point in points]):
            return Verdict(
                "Leave the model as it is.", (*(f"{line}." for line in refused), *unfinished)
            )
        said = f"No {other} plan is within the limits of this search ({limits})."
        return Verdict(
            "Leave the model as it is.", (said, *_beyond_limits(points, other), *unfinished)
        )
    named = f"plan {point.short_id} ({point.row['label']})"
    quality, memory = _quality(point), _memory(point, original)
    as_run = as_run_lines(point.row, facts.workload)
    ran = " ".join(part.strip() for part in as_run) if as_run else NOT_RUN
    aim, refused = _aim(facts.limits), refused_lines([point.row for point in points])
    said = (
        f"It is the {aim} proven plan within the limits of the search ({limits}){' that can be used' if refused else ''}: "
        f"{quality.name.lower()} {quality.value} ({quality.detail}), memory {memory.detail}."
    )
    uniform = ("It is a uniform plan: choosing layer by layer brought nothing more here.",)
    return Verdict(
        f"Use {named}: {times_words(point.row['as_run_speedup'] or point.row['speedup'])}.",
        (ran, said, *(uniform if point.row["kind"] == "uniform" else ()), *refused, *unfinished),
        (*_as_run(point, facts.workload), _speed(point), quality, memory),
    )


def _aim(limits: Any) -> str:
    return "smallest" if limits.get("minimize") == "memory" else "fastest"


def _beyond_limits(points: Sequence[PlanPoint], other: str) -> tuple[str, ...]:
    """The best of what the limits do not allow."""
    key = {"smaller": lambda point: point.memory_bytes, "faster": lambda point: point.request_ms}[
        other
    ]
    best = min(points, key=key)
    if best.at.is_unquantized:
        return (f"No proven plan is {other} at all.",)
    return (
        f"The {'smallest' if other == 'smaller' else 'fastest'} of all, plan {best.short_id} ({best.row['label']}), is "
        f"{times_words(best.row['speedup'])} with {_quality(best).name.lower()} {_quality(best).value} "
        f"and takes {units.size(best.memory_bytes)}.",
    )


def _as_run(point: PlanPoint, workload: Workload) -> tuple[Tile, ...]:
    """What the user gets, where that was measured."""
    row = point.row
    if row["as_run_request_ms"] is None:
        return ()
    ends = f"95 % interval {row['as_run_speedup_low']:.2f} to {row['as_run_speedup_high']:.2f}"
    detail = f"{loop_words(row['as_run_loop'], workload)}; {ends}"
    return (Tile("As you will run it", f"{row['as_run_speedup']:.2f}x", detail),)


def _speed(point: PlanPoint) -> Tile:
    time, speedup = point.request_ms, point.row["speedup"]
    detail = f"{units.duration_ms(time)} a request instead of {units.duration_ms(time * speedup)}"
    return Tile("In the search", f"{speedup:.2f}x", detail)


def _quality(point: PlanPoint) -> Tile:
    row = point.row
    ends = units.interval(row["perplexity_increase_low"], row["perplexity_increase_high"])
    return Tile(measure_words(row), increase_words(row), f"95 % interval {ends}")


def _memory(point: PlanPoint, original: PlanPoint | None) -> Tile:
    stored = units.size(point.memory_bytes)
    if original is None or not original.memory_bytes:
        return Tile("Memory", stored, "of all parameters")
    return Tile(
        "Memory",
        f"{point.memory_bytes / original.memory_bytes:.0%}",
        f"{stored} instead of {units.size(original.memory_bytes)}",
    )
