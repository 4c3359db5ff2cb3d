"""From timings to choices: each site's formats with their fastest routes, if they can pay."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import isqrt
from typing import Literal

import torch

from autoquant.candidates import A16, Candidate, Format, Kernel, get_format
from autoquant.candidates.experts import cannot_hold_experts, multiplies_experts
from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.floats import original_format
from autoquant.devices.memory import trim_memory
from autoquant.errors import ConstraintError
from autoquant.profiler.timing_table import FormatTimings, TimingTable
from autoquant.records import (
    LayerChoice,
    LinearShape,
    Numerics,
    Route,
    RouteStep,
    Site,
    Workload,
    route_kernel,
)
from autoquant.solver.constraints import Bound, Constraints
from autoquant.solver.planning import request_us

_SAME_SIZE = 1.01
"""A size up to 1 % larger is no worse: such formats differ only in their scales."""


@dataclass(frozen=True, slots=True)
class FormatFacts:
    """The size and the error that a format gives any weight of one shape.

    Attributes:
        memory_bytes: Bytes that the stored weight takes.
        weight_error: Relative error on Gaussian weights.
    """

    memory_bytes: int
    weight_error: float


Within = Literal["site", "format", "scheme"]
"""What choices that are compared have in common; a scheme is a format with the same roundings."""
Facts = Mapping[tuple[str, LinearShape], FormatFacts]
"""By format id and shape; a format that does not take the shape is missing."""


@dataclass(frozen=True, slots=True)
class SiteChoices:
    """The choices of one site.

    Attributes:
        dropped: Why the site cannot get the other formats, by format.
        barred: The unquantized choice, if a constraint bars the site from it.
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


def numerics_of(choice: LayerChoice) -> tuple[Numerics, ...]:
    """Return the numerics of the kernels in a choice's route, each once."""
    fmt = get_format(choice.format)
    activations = dict.fromkeys(fmt.kernel(step.kernel).numerics for step in choice.route)
    return tuple(Numerics(fmt.values, activation) for activation in activations)


def format_facts(
    formats: Sequence[Format], shapes: Sequence[LinearShape], device: str
) -> dict[tuple[str, LinearShape], FormatFacts]:
    """Quantize one Gaussian weight of each shape by each format that takes it.

    A format that differs from another only in its rounding has that format's facts: only scoring
    shows what better rounding is worth.
    """
    facts = {}
    for shape in shapes:
        generator = torch.Generator(device).manual_seed(0)
        normal = torch.randn(shape.n, shape.k, generator=generator, device=device)
        weight = normal.to(getattr(torch, shape.dtype))
        for fmt in formats:
            if fmt.unsupported(shape, 1, weight.device.type):
                continue
            nearest = get_format(fmt.rounds) if fmt.rounds else fmt
            if (nearest.id, shape) not in facts:
                stored = nearest.sample(weight)
                difference = nearest.dequantize(stored) - weight.float()
                error = (difference.norm() / weight.float().norm()).item()
                facts[nearest.id, shape] = FormatFacts(stored_bytes(stored), error)
                trim_memory()  # before the next format needs as much
            facts[fmt.id, shape] = facts[nearest.id, shape]
    return facts


def memory_bytes(site: Site, format_id: str, facts: Facts) -> int:
    """Return the bytes of a site's weight in a format.

    They include the original weight if that is kept for another use.
    """
    original = original_format(site.shape.dtype)
    kept = facts[original, site.shape].memory_bytes if site.kept and format_id != original else 0
    return site.experts * (facts[format_id, site.shape].memory_bytes + kept)


@dataclass(frozen=True, slots=True)
class ChoiceMaker:
    """Makes the choices of sites from what was measured.

    Attributes:
        may_tie: A weight that is kept beside a quantized one may be left out of what is delivered.
            So it drops no choice.
    """

    candidates: Sequence[Candidate]
    timings: TimingTable
    facts: Facts
    workload: Workload
    device_type: str
    may_tie: bool = False

    def choices(self, site: Site, *, within: Within = "site") -> SiteChoices:
        """Return all choices of a site that could be part of a front.

        Args:
            within: Choices that another one beats in everything are dropped, if both have this in
                common. Less than the site where other sites may need the site to have a choice.
        """
        choices: list[LayerChoice] = []
        dropped: dict[str, str] = {}
        by_format: dict[str, tuple[Format, list[Kernel]]] = {}
        for candidate in self.candidates:
            fmt = candidate.format
            by_format.setdefault(fmt.id, (fmt, []))[1].append(candidate.kernel)
        for fmt, kernels in by_format.values():
            measured = self.timings.of(site.shape, fmt.timed_as)
            if site.experts > 1:
                if reason := cannot_hold_experts(fmt, self.device_type):
                    dropped[fmt.id] = reason
                    continue
                kernels = [each for each in kernels if multiplies_experts(each, self.device_type)]
            routes = _routes(site, kernels, measured)
            if not routes:
                dropped[fmt.id] = measured.first_reason(kernels, [use.m for use in site.uses])
            size = memory_bytes(site, fmt.id, self.facts) if routes else 0
            choices += [_choice(site, fmt, route, measured, size) for route in routes]
        alike: dict[Hashable, list[LayerChoice]] = {}
        for choice in choices:
            alike.setdefault(self._in_common(choice, within), []).append(choice)
        kept = [choice for same in alike.values() for choice in self._pruned(same, dropped)]
        return SiteChoices(site, tuple(kept), dropped)

    def _in_common(self, choice: LayerChoice, within: Within) -> Hashable:
        if within == "site":
            return None
        if within == "format":
            return choice.format
        return choice.format, self._point(choice).roundings

    def constrained(self, site: Site, constraints: Constraints, bound: Bound) -> SiteChoices:
        """Return the choices that constraints and the engine leave a site.

        Raises:
            ConstraintError: The site is pinned to formats of which none can be used.
        """
        original = original_format(site.shape.dtype)
        within: Within = "scheme" if bound.group_of(site.name) else "site"
        admitted = [
            each
            for each in self.candidates
            if constraints.admits(site.name, each.id, original)
            and not bound.refuses(site.name, each.id)
        ]
        found = replace(self, candidates=admitted).choices(site, within=within)
        if not found.choices:
            why = "; ".join(f"{fmt}: {reason}" for fmt, reason in found.dropped.items())
            pinned = bound.reasons[site.name]
            raise ConstraintError(f"{site.name} is {pinned}, which cannot be used: {why}")
        if any(choice.format == original for choice in found.choices):
            return found
        # Plans are compared with the unquantized model, so its choice is needed all the same.
        unquantized = [c for c in self.candidates if c.format.id == original]
        barred = replace(self, candidates=unquantized).choices(site)
        return replace(found, barred=barred.original)

    def _pruned(self, choices: Sequence[LayerChoice], dropped: dict[str, str]) -> list[LayerChoice]:
        """Drop what another choice beats in time, memory and exactness, before scoring.

        More exact means: no activation rounding that the other does not do too, and a smaller
        error on Gaussian weights.
        """
        points = [self._point(choice) for choice in choices]
        kept: list[LayerChoice] = []
        for choice, point in zip(choices, points, strict=True):
            pairs = zip(choices, points, strict=True)
            better = [c.format for c, p in pairs if c is not choice and p.beats(point)]
            if not better or choice.format == original_format(choice.shape.dtype):
                kept.append(choice)
            for other in better:
                if other != choice.format:
                    dropped[choice.format] = f"{other} is at least as fast, as small and as exact"
        # A format that lost one choice may have kept a later one.
        for choice in kept:
            dropped.pop(choice.format, None)
        return kept

    def _point(self, choice: LayerChoice) -> _Point:
        facts = self.facts[choice.format, choice.shape]
        size = facts.memory_bytes if self.may_tie else choice.memory_bytes
        roundings = frozenset(numerics.activation for numerics in numerics_of(choice)) - {A16}
        request = request_us(choice, self.workload)
        least = 0.0 if get_format(choice.format).without_inputs else facts.weight_error
        return _Point(request, size, facts.weight_error, least, roundings)


@dataclass(frozen=True, slots=True)
class _Point:
    """A choice as pruning sees it. In all, less is better.

    Attributes:
        weight_error: Relative error on Gaussian weights.
        least_error: That, or 0 if the weight is made for the layer's inputs: only scoring shows
            what that is worth.
    """

    request_us: float
    memory_bytes: int
    weight_error: float
    least_error: float
    roundings: frozenset[str]

    def beats(self, other: _Point) -> bool:
        """Check whether this is no worse in everything. Of two equals, the smaller one beats."""
        if not self.roundings <= other.roundings:
            return False
        if (self.request_us, self.weight_error) == (other.request_us, other.least_error):
            return self.memory_bytes < other.memory_bytes
        return (
            self.request_us <= other.request_us
            and self.weight_error <= other.least_error
            and self.memory_bytes <= other.memory_bytes * _SAME_SIZE
        )


def why_untimed(site: Site, candidates: Sequence[Candidate], timings: TimingTable) -> str:
    """Return why the unquantized linear of a site has no timing, or an empty string."""
    original = original_format(site.shape.dtype)
    kernels = [each.kernel for each in candidates if each.format.id == original]
    if not kernels:
        return f"its weight is {site.shape.dtype}, unlike most of the model"
    measured = timings.of(site.shape, original)
    if _routes(site, kernels, measured):
        return ""
    return f"its unquantized linear: {measured.first_reason(kernels, [u.m for u in site.uses])}"


def scored(choices: SiteChoices, losses: Mapping[tuple[str, str], float]) -> SiteChoices:
    """Fill in the numerics and losses: of those in a choice's route the worst ones count.

    Numerics that round activations are worse than those that do not, whatever their losses say:
    these are estimates, and may be closer than their errors.

    Args:
        losses: By (site name, text of the numerics). A choice without a score is dropped.
    """
    filled = []
    for choice in choices.choices:
        found = {each: losses.get((choices.site.name, str(each))) for each in numerics_of(choice)}
        known = {each: loss for each, loss in found.items() if loss is not None}
        if len(known) == len(found):
            worst = max(known, key=lambda each: (each.activation != A16, known[each]))
            filled.append(replace(choice, numerics=str(worst), loss=max(known.values())))
    return replace(choices, choices=tuple(filled))


def _rounding_sets(kernels: Sequence[Kernel]) -> Iterator[tuple[str, ...]]:
    """Yield every set of activation roundings that a route over these kernels may use."""
    roundings = list(dict.fromkeys(kernel.numerics for kernel in kernels))
    for size in range(1, len(roundings) + 1):
        yield from combinations(roundings, size)


def _routes(site: Site, kernels: Sequence[Kernel], measured: FormatTimings) -> list[Route]:
    """Return the fastest route for every set of activation roundings.

    A set without a usable kernel for each of the site's m has no route.
    """
    routes: dict[Route, None] = {}  # two sets may give the same route
    rows = sorted({use.m for use in site.uses})
    for allowed in _rounding_sets(kernels):
        best = [(m, measured.fastest(kernels, allowed, m)) for m in rows]
        usable = [(m, kernel) for m, kernel in best if kernel is not None]
        if len(usable) == len(rows):
            routes[_merge(usable, measured)] = None
    return list(routes)


def _merge(best: Sequence[tuple[int, str]], measured: FormatTimings) -> Route:
    """Make a route of the best kernel at each m.

    Where the kernel changes between two m was not measured: see `_overtaken`.
    """
    steps: list[RouteStep] = []
    for (m, kernel), following in zip(best, [*best[1:], None], strict=True):
        if following is None:
            steps.append(RouteStep(upper_m=None, kernel=kernel))
        elif following[1] != kernel:
            upper_m = _overtaken(measured, (m, kernel), following)
            steps.append(RouteStep(upper_m=upper_m, kernel=kernel))
    return tuple(steps)


def _overtaken(measured: FormatTimings, low: tuple[int, str], high: tuple[int, str]) -> int:
    """Return the last m up to which the kernel that is best at the lower m is expected to be.

    A kernel reads its weight, and then works for each row. So between two timings its latency is
    taken to grow in proportion to the rows. If a kernel cannot be used at the other m, the
    geometric mean is assumed.
    """
    (first_m, first), (last_m, last) = low, high

    def lead_us(m: int) -> float | None:
        before, after = measured.latency_us(first, m), measured.latency_us(last, m)
        return None if before is None or after is None else after - before

    ahead_us, behind_us = lead_us(first_m), lead_us(last_m)
    if ahead_us is None or behind_us is None or ahead_us <= behind_us:
        return isqrt(first_m * last_m)
    share = ahead_us / (ahead_us - behind_us)
    return min(first_m + int(share * (last_m - first_m)), last_m - 1)


def _choice(
    site: Site, fmt: Format, route: Route, measured: FormatTimings, memory_bytes: int
) -> LayerChoice:
    """Make a choice that is not scored yet."""
    latency: dict[str, float] = {}
    for use in site.uses:
        one_us = measured.latency_us(route_kernel(route, use.m), use.m)
        assert one_us is not None  # a route is made of kernels that were timed
        latency[use.phase] = latency.get(use.phase, 0.0) + use.calls * one_us
    return LayerChoice(
        name=site.name,
        parameters=site.parameters,
        shape=site.shape,
        format=fmt.id,
        route=route,
        numerics="",
        latency_us=latency,
        memory_bytes=memory_bytes,
        loss=0.0,
        experts=site.experts,
        turned=site.turned,
    )
