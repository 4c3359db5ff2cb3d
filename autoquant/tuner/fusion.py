"""Compute linears that read the same input as one, if all get the same format and that is faster.

The shape of all of them together is timed like any other. Each way to compute them as one is a
further choice of each of them. Its time is divided among them by their rows, and the solver gives
it to all of them or to none. Uniform plans are made layer by layer instead; siblings are joined
afterwards if one product of all takes less time than theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoquant.candidates import A16, Candidate
from autoquant.profiler.measure import cells_of, subjects_of
from autoquant.profiler.timing_table import TimingTable
from autoquant.records import LayerChoice, LinearShape, Route, Site, TimingSubject, Workload
from autoquant.solver.planning import request_us
from autoquant.tuner.choices import (
    ChoiceMaker,
    Facts,
    FormatFacts,
    SiteChoices,
    memory_bytes,
    numerics_of,
)

_SAME_FOR_ALL = FormatFacts(0, 0.0)
"""The ways to compute one format do not differ in memory and exactness."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sites that could be computed as one.

    Attributes:
        names: Their names.
        site: All of them as one site.
        choices: What that site could get, timed at its shape, without losses and memory.
        dropped: Why it could not get the rest, by format.
    """

    names: tuple[str, ...]
    site: Site
    choices: tuple[LayerChoice, ...]
    dropped: Mapping[str, str]

    def reasons(self) -> Iterator[str]:
        """Yield each format that the group cannot get, with the reason."""
        for format_id, reason in self.dropped.items():
            yield f"{format_id}: {reason}"


@dataclass(frozen=True, slots=True)
class Fusion:
    """All groups of a model.

    Attributes:
        scored: What members can get as one, with losses, by `_key`.
    """

    groups: tuple[Group, ...]
    workload: Workload
    scored: Mapping[_Key, LayerChoice] = field(default_factory=dict)

    def with_scores(self, options: Sequence[Sequence[LayerChoice]]) -> Fusion:
        """Return the fusion with the scored options of all layers."""
        joined = (choice for layer in options for choice in layer if choice.joined)
        return replace(self, scored={_key(choice): choice for choice in joined})

    def offered(self, choices: Sequence[SiteChoices], facts: Facts) -> list[SiteChoices]:
        """Add to the choices of every member of a group those to be computed as one.

        Args:
            facts: Of each format at the members' shapes. A format that a member cannot have is not
                offered.
        """
        sites = {choice.site.name: choice.site for choice in choices}
        added: dict[str, list[LayerChoice]] = {name: [] for name in sites}
        for group in self.groups:
            members = [sites[name] for name in group.names]
            for whole in group.choices:
                if all((whole.format, member.shape) in facts for member in members):
                    for member in members:
                        size = memory_bytes(member, whole.format, facts)
                        added[member.name].append(_share(member, whole, group, size))
        return [
            replace(choice, choices=(*choice.choices, *added[choice.site.name]))
            for choice in choices
        ]

    def join(self, choices: Sequence[LayerChoice]) -> list[LayerChoice]:
        """Join the layers of a plan that can be joined and are faster so."""
        by_name = {choice.name: choice for choice in choices}
        for group in self.groups:
            members = [by_name[name] for name in group.names]
            by_name |= {best.name: best for best in self._best(group, members)}
        return [by_name[choice.name] for choice in choices]

    def _best(self, group: Group, members: Sequence[LayerChoice]) -> list[LayerChoice]:
        """Return the fastest way to compute the members: alone, or as one.

        Computed as one, they round only activations that a member rounds already.
        """
        if len({member.format for member in members}) > 1:
            return list(members)
        allowed = {A16}.union(*map(_activations, members))
        ways = [
            self._way(group, whole, members)
            for whole in group.choices
            if whole.format == members[0].format and _activations(whole) <= allowed
        ]

        def total_us(way: Sequence[LayerChoice]) -> float:
            return sum(request_us(one, self.workload) for one in way)

        alone: list[list[LayerChoice]] = [list(members)]
        return min([*alone, *filter(None, ways)], key=total_us)

    def _way(
        self, group: Group, whole: LayerChoice, members: Sequence[LayerChoice]
    ) -> list[LayerChoice] | None:
        """Return the members' shares of `whole`, or None if one of them was not scored for it."""
        keys = [(member.name, group.names, whole.format, whole.route) for member in members]
        if not all(key in self.scored for key in keys):
            return None
        pairs = zip(keys, members, strict=True)
        return [replace(self.scored[key], reason=member.reason) for key, member in pairs]


_Key = tuple[str, tuple[str, ...], str, Route]


def _key(choice: LayerChoice) -> _Key:
    return choice.name, choice.joined, choice.format, choice.route


def sibling_sites(sites: Sequence[Site]) -> list[tuple[tuple[str, ...], Site]]:
    """Group the sites that read the same input in the same phases.

    Returns:
        The names of each group, and all of it as one site.
    """
    by_name = {site.name: site for site in sites}
    found: dict[tuple[str, ...], Site] = {}
    for site in sites:
        members = [by_name[name] for name in site.siblings if name in by_name]
        alike = [
            other
            for other in members
            if (other.shape.k, other.uses) == (site.shape.k, site.uses) and other.experts == 1
        ]
        names = tuple(other.name for other in alike)
        if len(names) < 2 or names in found:
            continue
        shape = LinearShape(
            n=sum(other.shape.n for other in alike),
            k=site.shape.k,
            bias=False,
            dtype=site.shape.dtype,
        )
        found[names] = Site(name=" + ".join(names), parameters=(), shape=shape, uses=site.uses)
    return list(found.items())


def joining(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates whose weights can be joined."""
    return [candidate for candidate in candidates if candidate.format.joins]


def fusion_subjects(
    sites: Sequence[Site], candidates: Sequence[Candidate], working_set: int
) -> list[TimingSubject]:
    """Return what has to be timed to know which siblings are faster as one."""
    cells = cells_of([site for _, site in sibling_sites(sites)])
    return subjects_of(cells, joining(candidates), working_set)


def make_fusion(
    sites: Sequence[Site],
    candidates: Sequence[Candidate],
    timings: TimingTable,
    workload: Workload,
    device_type: str,
) -> Fusion:
    """Find the groups of a model's sites, and what each could get."""
    joinable = joining(candidates)
    groups = []
    for names, site in sibling_sites(sites):
        facts = {(candidate.format.id, site.shape): _SAME_FOR_ALL for candidate in joinable}
        maker = ChoiceMaker(joinable, timings, facts, workload, device_type)
        found = maker.choices(site, within="format")
        groups.append(Group(names, site, found.choices, found.dropped))
    return Fusion(tuple(groups), workload)


def _share(member: Site, whole: LayerChoice, group: Group, memory_bytes: int) -> LayerChoice:
    """Return a member's part of what all of them get. The time is divided by rows."""
    share = member.shape.n / group.site.shape.n
    return LayerChoice(
        name=member.name,
        parameters=member.parameters,
        shape=member.shape,
        format=whole.format,
        route=whole.route,
        numerics=whole.numerics,
        latency_us={phase: us * share for phase, us in whole.latency_us.items()},
        memory_bytes=memory_bytes,
        loss=0.0,
        joined=group.names,
    )


def _activations(choice: LayerChoice) -> set[str]:
    """Return the activation roundings of the kernels that the route uses."""
    return {numerics.activation for numerics in numerics_of(choice)}
