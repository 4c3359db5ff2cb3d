"""The first sentences of a report: use this plan, or leave the model unquantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """One large number, with a comparison."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A headline, its sentences, and the numbers behind a recommendation."""

    headline: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...] = ()


def verdict(points: Sequence[PlanPoint], facts: StudyFacts) -> Verdict:
    """Return the recommended plan in a sentence, or why there is none."""
    found = _verdict(points, facts)
    if facts.complete:
        return found
    unfinished = "This search is not finished: more plans may be proven."
    return replace(found, sentences=(*found.sentences, unfinished))


def _verdict(points: Sequence[PlanPoint], facts: StudyFacts) -> Verdict:
    point = next((point for point in points if point.row["recommended"]), None)
    if point is None:
        limits = limits_words(facts.limits)
        return Verdict(
            "No plan can be recommended.", (f"No proven plan is within the limits ({limits}).",)
        )
    if point.at.is_unquantized:
        return Verdict("Leave the model unquantized.", _why_unquantized(points, facts))
    return _use(point, points, facts)


def _why_unquantized(points: Sequence[PlanPoint], facts: StudyFacts) -> tuple[str, ...]:
    if refused := refused_lines([point.row for point in points]):
        return tuple(f"{line}." for line in refused)
    other = "smaller" if facts.limits.get("minimize") == "memory" else "faster"
    limits = limits_words(facts.limits)
    said = f"No {other} plan is within the limits of this search ({limits})."
    return (said, _beyond_limits(points, other))


def _use(point: PlanPoint, points: Sequence[PlanPoint], facts: StudyFacts) -> Verdict:
    unquantized = next((point for point in points if point.at.is_unquantized), None)
    quality, memory = _quality(point), _memory(point, unquantized)
    as_run = as_run_lines(point.row, facts.workload)
    refused = refused_lines([point.row for point in points])
    aim = "smallest" if facts.limits.get("minimize") == "memory" else "fastest"
    usable = " that can be used" if refused else ""
    sentences = [
        " ".join(part.strip() for part in as_run) if as_run else NOT_RUN,
        f"It is the {aim} proven plan within the limits of the search "
        f"({limits_words(facts.limits)}){usable}: {quality.name.lower()} {quality.value}"
        f" ({quality.detail}), memory {memory.detail}.",
    ]
    if point.row["kind"] == "uniform":
        sentences.append("It is a uniform plan: choosing layer by layer brought nothing more here.")
    speedup = times_words(point.row["as_run_speedup"] or point.row["speedup"])
    return Verdict(
        f"Use plan {point.short_id} ({point.row['label']}): {speedup}.",
        (*sentences, *refused),
        (*_as_run(point, facts.workload), _speed(point), quality, memory),
    )


def _beyond_limits(points: Sequence[PlanPoint], other: str) -> str:
    """Return the best plan that the limits rule out, in a sentence."""
    superlative, best = "fastest", min(points, key=lambda point: point.request_ms)
    if other == "smaller":
        superlative, best = "smallest", min(points, key=lambda point: point.memory_bytes)
    if best.at.is_unquantized:
        return f"No proven plan is {other} at all."
    quality = _quality(best)
    return (
        f"The {superlative} of all, plan {best.short_id} ({best.row['label']}), is "
        f"{times_words(best.row['speedup'])} with {quality.name.lower()} {quality.value} "
        f"and takes {units.size(best.memory_bytes)}."
    )


def _as_run(point: PlanPoint, workload: Workload) -> tuple[Tile, ...]:
    """Return the speed of the plan as its user runs it, if that was measured."""
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
