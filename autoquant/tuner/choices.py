"""From timings to choices: for each site, every format with its fastest routes, less those that cannot pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt

import torch

from autoquant.candidates import Format, Kernel, get_format
from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.floats import original_format
from autoquant.devices.memory import trim_memory
from autoquant.errors import ConstraintError
from autoquant.profiler.crossovers import FormatTimings, numerics_sets
from autoquant.records import (
    LayerChoice,
    LinearShape,
    Measurement,
    Route,
    RouteStep,
    Site,
    TimingSubject,
    Workload,
    route_kernel,
)
from autoquant.solver.constraints import Bound, Constraints
from autoquant.solver.planning import request_us

_SAME_SIZE = 1.01


@dataclass(frozen=True, slots=True)
class FormatFacts:
    """What a format does to a weight of one shape, whatever its values: bytes, and relative error on Gaussian weights."""

    memory_bytes: int
    weight_error: float


@dataclass(frozen=True, slots=True)
class SiteChoices:
    """What one site can get. `dropped` says why the rest cannot, by format.

    Attributes:
        barred: The unquantized choice, where a constraint bars the site from it.
    """

    site: Site
    choices: tuple[LayerChoice, ...]
    dropped: Mapping[str, str]
    barred: LayerChoice | None = None

    @property
    def original(self) -> LayerChoice:
        """The unquantized choice."""
        if self.barred is not None:
            return self.barred
        wanted = original_format(self.site.shape.dtype)
        return next(choice for choice in self.choices if choice.format == wanted)


def numerics_key(fmt: Format, numerics: str) -> str:
    """Key of a quality score: the same numbers and the same activation rounding score the same."""
    return f"{fmt.values}+{numerics}"


def format_facts(
    formats: Sequence[Format], shapes: Sequence[LinearShape], device: str
) -> dict[tuple[str, LinearShape], FormatFacts]:
    """Quantize one Gaussian weight of each shape by each format that takes it.

    One that differs from another in its rounding alone has that one's facts: what better rounding is worth, only scoring tells.
    """
    facts = {}
    for shape in shapes:
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(shape.n, shape.k, generator=generator, device=device).to(getattr(torch, shape.dtype))
        for fmt in formats:
            if fmt.unsupported(shape, 1, weight.device.type):
                continue
            nearest = get_format(fmt.rounds) if fmt.rounds else fmt
            if (nearest.id, shape) not in facts:
                stored = nearest.store(weight)
                error = ((nearest.dequantize(stored) - weight.float()).norm() / weight.float().norm()).item()
                facts[nearest.id, shape] = FormatFacts(stored_bytes(stored), error)
                trim_memory()
            facts[fmt.id, shape] = facts[nearest.id, shape]
    return facts


def memory_bytes(site: Site, format_id: str, facts: Mapping[tuple[str, LinearShape], FormatFacts]) -> int:
    """Bytes of a site's weight in a format, with the original's where that is kept for another use."""
    original = original_format(site.shape.dtype)
    kept = facts[original, site.shape].memory_bytes if site.kept and format_id != original else 0
    return facts[format_id, site.shape].memory_bytes + kept


def site_choices(
    site: Site,
    candidates: Sequence[tuple[Format, Kernel]],
    timings: Mapping[TimingSubject, Measurement],
    facts: Mapping[tuple[str, LinearShape], FormatFacts],
    workload: Workload,
    working_set: int,
    *,
    across_formats: bool = True,
) -> SiteChoices:
    """All choices of one site that could be part of a front.

    Args:
        across_formats: Leave out a format that another one beats in everything; other sites may need it otherwise.
    """
    choices: list[LayerChoice] = []
    dropped: dict[str, str] = {}
    by_format: dict[str, tuple[Format, list[Kernel]]] = {}
    for fmt, kernel in candidates:
        by_format.setdefault(fmt.id, (fmt, []))[1].append(kernel)
    for fmt, kernels in by_format.values():
        measured = FormatTimings(site.shape, fmt.timed_as, working_set, timings)
        routes = _routes(site, kernels, measured)
        if not routes:
            dropped[fmt.id] = _first_reason(site, kernels, measured, timings)
        choices += [_choice(site, fmt, route, measured, memory_bytes(site, fmt.id, facts)) for route in routes]
    if across_formats:
        kept = _prune(choices, facts, workload, original_format(site.shape.dtype), dropped)
    else:
        each = [[choice for choice in choices if choice.format == fmt] for fmt in by_format]
        kept = [c for same in each for c in _prune(same, facts, workload, original_format(site.shape.dtype), dropped)]
    return SiteChoices(site, tuple(kept), dropped)


def constrained_choices(
    site: Site,
    candidates: Sequence[tuple[Format, Kernel]],
    timings: Mapping[TimingSubject, Measurement],
    facts: Mapping[tuple[str, LinearShape], FormatFacts],
    workload: Workload,
    working_set: int,
    *,
    constraints: Constraints,
    bound: Bound,
) -> SiteChoices:
    """The choices of one site that constraints leave it.

    Raises:
        ConstraintError: None of what the site is pinned to can be used.
    """
    original = original_format(site.shape.dtype)
    same = not bound.group_of(site.name)

    def made(pairs: Sequence[tuple[Format, Kernel]]) -> SiteChoices:
        return site_choices(site, pairs, timings, facts, workload, working_set, across_formats=same)

    admitted = [(f, k) for f, k in candidates if constraints.admits(site.name, (f.id, k.id), original)]
    found = made(admitted)
    if not found.choices:
        why = "; ".join(dict.fromkeys(f"{fmt}: {reason}" for fmt, reason in found.dropped.items()))
        raise ConstraintError(f"{site.name} is {bound.reasons[site.name]}, which cannot be used: {why}")
    if any(choice.format == original for choice in found.choices):
        return found
    unquantized = made([(f, k) for f, k in candidates if f.id == original])
    return replace(found, barred=unquantized.original)


def _first_reason(
    site: Site, kernels: Sequence[Kernel], measured: FormatTimings, timings: Mapping[TimingSubject, Measurement]
) -> str:
    """Why the first kernel that cannot be used cannot."""
    made = (timings[measured.subject(kernel.id, use.m)] for kernel in kernels for use in site.uses)
    return next(measurement.reason for measurement in made if measurement.outcome != "ok")


def _routes(site: Site, kernels: Sequence[Kernel], measured: FormatTimings) -> list[Route]:
    """The fastest route for every set of activation numerics that covers all of the site's m."""
    routes: dict[Route, None] = {}
    rows = sorted({use.m for use in site.uses})
    for allowed in numerics_sets(kernels):
        best = [(m, measured.fastest(kernels, allowed, m)) for m in rows]
        usable = [(m, kernel) for m, kernel in best if kernel is not None]
        if len(usable) == len(rows):
            routes[_merge(usable)] = None
    return list(routes)


def _merge(best: Sequence[tuple[int, str]]) -> Route:
    """Kernels by m to a route: where the kernel changes is not known yet, and taken to be the geometric mean of two m."""
    steps: list[RouteStep] = []
    for (m, kernel), following in zip(best, [*best[1:], None], strict=True):
        if following is None:
            steps.append(RouteStep(upper_m=None, kernel=kernel))
        elif following[1] != kernel:
            steps.append(RouteStep(upper_m=isqrt(m * following[0]), kernel=kernel))
    return tuple(steps)


def _choice(
    site: Site,
    fmt: Format,
    route: Route,
    measured: FormatTimings,
    memory_bytes: int,
) -> LayerChoice:
    latency: dict[str, float] = {}
    for use in site.uses:
        one_us = measured.latency_us(route_kernel(route, use.m), use.m)
        assert one_us is not None  # a route is made of kernels that were timed
        latency[use.phase] = latency.get(use.phase, 0.0) + use.calls * one_us
    used = list(dict.fromkeys(fmt.kernel(step.kernel).numerics for step in route))
    return LayerChoice(
        name=site.name,
        parameters=site.parameters,
        shape=site.shape,
        format=fmt.id,
        route=route,
        numerics=" ".join(numerics_key(fmt, numerics) for numerics in used),
        latency_us=latency,
        memory_bytes=memory_bytes,
        loss=0.0,
    )


def _prune(
    choices: Sequence[LayerChoice],
    facts: Mapping[tuple[str, LinearShape], FormatFacts],
    workload: Workload,
    original: str,
    dropped: dict[str, str],
) -> list[LayerChoice]:
    """Leave out what another choice beats in time, memory and exactness at once, before any quality is scored.

    Exactness: no activation rounding that the other does not do too, and a smaller error on Gaussian weights. A size up to 1 %
    larger is no worse: such formats differ in their scales alone.
    """

    def point(choice: LayerChoice) -> tuple[float, float, float]:
        return request_us(choice, workload), choice.memory_bytes, facts[choice.format, choice.shape].weight_error

    def beats(other: LayerChoice, choice: LayerChoice) -> bool:
        (us, size, error), (own_us, own_size, own_error) = point(other), point(choice)
        if (us, error) == (own_us, own_error):
            return size < own_size
        return us <= own_us and error <= own_error and size <= own_size * _SAME_SIZE

    def activations(choice: LayerChoice) -> set[str]:
        return {key.partition("+")[2] for key in choice.numerics.split()} - {"a16"}

    kept = []
    for choice in choices:
        better = next(
            (
                other
                for other in choices
                if other is not choice and activations(other) <= activations(choice) and beats(other, choice)
            ),
            None,
        )
        if better is None or choice.format == original:
            kept.append(choice)
        elif choice.format not in {c.format for c in kept}:
            dropped[choice.format] = f"{better.format} is at least as fast, as small and as exact"
    for choice in kept:
        dropped.pop(choice.format, None)
    return kept


def scored(choices: SiteChoices, losses: Mapping[tuple[str, str], float]) -> SiteChoices:
    """The choices with their losses filled in: the worst of the numerics that a choice's route uses.

    Args:
        losses: By (site name, numerics key). A choice without a score is dropped.
    """
    name = choices.site.name
    filled = []
    for choice in choices.choices:
        keys = choice.numerics.split()
        if all((name, key) in losses for key in keys):
            worst = max(keys, key=lambda key: losses[name, key])
            filled.append(replace(choice, numerics=worst, loss=losses[name, worst]))
    return replace(choices, choices=tuple(filled))
