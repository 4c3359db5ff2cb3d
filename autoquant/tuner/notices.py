"""Report what a search leaves out, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from autoquant.records import Site
from autoquant.solver.constraints import Bound, Constraints
from autoquant.tuner.choices import SiteChoices
from autoquant.tuner.fusion import Fusion


def constraint_notices(
    constraints: Constraints, bound: Bound, sites: Sequence[Site]
) -> Iterator[str]:
    """Say how many layers constraints are about."""
    reasons = (constraints.reason(site.name) for site in sites)
    for reason, count in Counter(filter(None, reasons)).items():
        yield f"{count} of {len(sites)} layers {reason}"
    if constraints.fusable:
        grouped = sum(map(len, bound.groups))
        yield (
            f"{grouped} layers in {len(bound.groups)} groups of one format each, which"
            f" {constraints.fusable} fuses"
        )


def fusion_notices(fusion: Fusion) -> Iterator[str]:
    """Say which layers cannot be computed as one."""
    if not fusion.groups:
        yield "no layers read the same input: nothing can be computed as one"
    elif not any(group.choices or group.dropped for group in fusion.groups):
        yield (
            "layers are not computed as one: no candidate's weights can lie behind one another;"
            " allow others"
        )
    reasons = Counter(reason for group in fusion.groups for reason in group.reasons())
    for reason, count in reasons.items():
        yield f"{count} of {len(fusion.groups)} groups not computed as one by {reason}"


def dropped_notices(choices: Sequence[SiteChoices]) -> Iterator[str]:
    """Say which formats layers cannot get."""
    dropped = Counter(item for choice in choices for item in choice.dropped.items())
    alike: dict[tuple[str, int], list[str]] = {}
    for (format_id, reason), count in dropped.items():
        alike.setdefault((reason, count), []).append(format_id)
    for (reason, count), formats in alike.items():
        yield f"{', '.join(formats)} not considered for {count} of {len(choices)} layers: {reason}"
