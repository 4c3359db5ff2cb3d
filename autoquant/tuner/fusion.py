"""Linears that read the same input computed as one, where every one of them gets the same format and that is faster.

The shape of all of them together is timed like any other. Each way to compute them as one is a further choice of every one of
them, its time divided among them by their rows, and the solver gives it to all of them or to none. Uniform plans are made layer
by layer instead, and siblings joined where one product of all takes less time than theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoquant.candidates import A16, Format, Kernel, get_format
from autoquant.profiler.measure import cells_of, subjects_of
from autoquant.records import LayerChoice, LinearShape, Measurement, Route, Site, TimingSubject, Workload
from autoquant.solver.planning import request_us
from autoquant.tuner.choices import FormatFacts, SiteChoices, memory_bytes, site_choices


@dataclass(frozen=True, slots=True)
class Group:
    """Sites that could be computed as one.

    Attributes:
        names: Theirs.
        site: All of them as one site.
        choices: What that site could get, timed at its shape; losses and memory are not filled in.
        dropped: Why it could not get the rest, by format.
    """

    names: tuple[str, ...]
    site: Site
    choices: tuple[LayerChoice, ...]
    dropped: Mapping[str, str]

    def reasons(self) -> Iterator[str]:
        """What it cannot get, with the reason why."""
        for format_id, reason in self.dropped.items():
            yield f"{format_id}: {reason}"


@dataclass(frozen=True, slots=True)
class Fusion:
    """All groups of a model.

    Attributes:
        scored: What members can get as one, with their losses, by `_key`.
    """

    groups: tuple[Group, ...]
    workload: Workload
    scored: Mapping[_Key, LayerChoice] = field(default_factory=dict)

    def with_scores(self, options: Sequence[Sequence[LayerChoice]]) -> Fusion:
        """With the options of all layers, scored."""
        return replace(self, scored={_key(choice): choice for layer in options for choice in layer if choice.joined})

    def offered(
        self, choices: Sequence[SiteChoices], facts: Mapping[tuple[str, LinearShape], FormatFacts]
    ) -> list[SiteChoices]:
        """The choices of all sites, with being computed as one among those of every member of a group.

        Args:
            facts: Of each format at the members' shapes; one that a member cannot have is not offered.
        """
        sites = {choice.site.name: choice.site for choice in choices}
        added: dict[str, list[LayerChoice]] = {name: [] for name in sites}
        for group in self.groups:
            members = [sites[name] for name in group.names]
            for whole in group.choices:
                if all((whole.format, member.shape) in facts for member in members):
                    for member in members:
                        own = _own(member, whole, memory_bytes(member, whole.format, facts))
                        added[member.name].append(_joined(own, whole, group))
        return [replace(choice, choices=(*choice.choices, *added[choice.site.name])) for choice in choices]

    def join(self, choices: Sequence[LayerChoice]) -> list[LayerChoice]:
        """A plan's choices, made layer by layer, with those joined that can be and are faster so."""
        by_name = {choice.name: choice for choice in choices}
        for group in self.groups:
            members = [by_name[name] for name in group.names]
            by_name |= {best.name: best for best in self._best(group, members)}
        return [by_name[choice.name] for choice in choices]

    def _best(self, group: Group, members: Sequence[LayerChoice]) -> list[LayerChoice]:
        """The fastest way to compute the members as one, where it is faster than they are and rounds nothing that none does."""
        if len({member.format for member in members}) > 1:
            return []
        allowed = {A16}.union(*map(_numerics, members))
        ways = [
            [
                replace(self.scored[key], reason=member.reason)
                for member in members
                if (key := (member.name, group.names, whole.format, whole.route)) in self.scored
            ]
            for whole in group.choices
            if whole.format == members[0].format and _numerics(whole) <= allowed
        ]
        complete_ways = [way for way in ways if len(way) == len(members)]
        best = min([members, *complete_ways], key=lambda way: sum(request_us(one, self.workload) for one in way))
        return list(best)


_Key = tuple[str, tuple[str, ...], str, Route]


def _key(choice: LayerChoice) -> _Key:
    return choice.name, choice.joined, choice.format, choice.route


def sibling_sites(sites: Sequence[Site]) -> list[tuple[tuple[str, ...], Site]]:
    """The groups of sites that read the same input in the same phases, each as one site of the shape of all."""
    by_name = {site.name: site for site in sites}
    found: dict[tuple[str, ...], Site] = {}
    for site in sites:
        members = [by_name[name] for name in site.siblings if name in by_name]
        alike = [other for other in members if (other.shape.k, other.uses) == (site.shape.k, site.uses)]
        names = tuple(other.name for other in alike)
        if len(names) < 2 or names in found:
            continue
        shape = LinearShape(n=sum(other.shape.n for other in alike), k=site.shape.k, bias=False, dtype=site.shape.dtype)
        found[names] = Site(name=" + ".join(names), parameters=(), shape=shape, uses=site.uses)
    return list(found.items())


def joining(candidates: Sequence[tuple[Format, Kernel]]) -> list[tuple[Format, Kernel]]:
    """The candidates whose weights can be joined."""
    return [(fmt, kernel) for fmt, kernel in candidates if fmt.joins]


def fusion_subjects(
    sites: Sequence[Site], candidates: Sequence[tuple[Format, Kernel]], working_set: int
) -> list[TimingSubject]:
    """What has to be timed to know which siblings are faster as one."""
    cells = cells_of([site for _, site in sibling_sites(sites)])
    return subjects_of(cells, joining(candidates), working_set)


def make_fusion(
    sites: Sequence[Site],
    candidates: Sequence[tuple[Format, Kernel]],
    timings: Mapping[TimingSubject, Measurement],
    workload: Workload,
    working_set: int,
) -> Fusion:
    """The groups of a model's sites with what each could get."""
    groups = []
    for names, site in sibling_sites(sites):
        choices: list[LayerChoice] = []
        dropped: dict[str, str] = {}
        for fmt in dict.fromkeys(fmt for fmt, _ in joining(candidates)):
            kernels = [(fmt, kernel) for of, kernel in candidates if of.id == fmt.id]
            # Memory and exactness are those of the members; a format is only compared with itself here.
            facts = {(fmt.id, site.shape): FormatFacts(0, 0.0)}
            found = site_choices(site, kernels, timings, facts, workload, working_set)
            choices += found.choices
            dropped |= found.dropped
        groups.append(Group(names, site, tuple(choices), dropped))
    return Fusion(tuple(groups), workload)


def complete(options: Sequence[Sequence[LayerChoice]]) -> list[list[LayerChoice]]:
    """The options of all layers, less those that compute layers as one where one of them lacks it (it was not scored)."""
    known = {_key(choice) for layer in options for choice in layer}
    return [
        [c for c in layer if all((name, c.joined, c.format, c.route) in known for name in c.joined)]
        for layer in options
    ]


def _own(member: Site, whole: LayerChoice, stored_bytes: int) -> LayerChoice:
    """A member's part of what all of them get, without the time."""
    return LayerChoice(
        name=member.name,
        parameters=member.parameters,
        shape=member.shape,
        format=whole.format,
        route=whole.route,
        numerics=whole.numerics,
        latency_us={},
        memory_bytes=stored_bytes,
        loss=0.0,
    )


def _joined(member: LayerChoice, whole: LayerChoice, group: Group) -> LayerChoice:
    share = member.shape.n / group.site.shape.n
    return replace(
        member,
        route=whole.route,
        latency_us={phase: us * share for phase, us in whole.latency_us.items()},
        joined=group.names,
    )


def _numerics(choice: LayerChoice) -> set[str]:
    """The numerics of the kernels that the route uses."""
    fmt = get_format(choice.format)
    return {fmt.kernel(step.kernel).numerics for step in choice.route}
