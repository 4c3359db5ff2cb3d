"""Report what a search leaves out, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from autoquant.records import Site
from autoquant.solver.constraints import Bound, Constraints
from autoquant.solver.served import refusal_lines
from autoquant.tuner.choices import SiteChoices
from autoquant.tuner.fusion import Fusion


def constraint_notices(constraints: Constraints, sites: Sequence[Site]) -> Iterator[str]:
    """Say how many layers --keep and --pin are about."""
    reasons = (constraints.reason(site.name) for site in sites)
    for reason, count in Counter(filter(None, reasons)).items():
        yield f"{count} of {len(sites)} layers {reason}"


def engine_notices(
    engine: str, not_held: Mapping[str, str], bound: Bound, sites: Sequence[Site]
) -> Iterator[str]:
    """Say what an engine cannot hold: of the candidates, and of the model.

    Args:
        not_held: Candidates that it holds for no layer, with the reason.
    """
    for line in refusal_lines(not_held):
        yield f"for {engine}: left out {line}"
    where: dict[tuple[str, str], list[str]] = {}
    for layer, refused in bound.refused.items():
        values = {candidate.partition("/")[0]: why for candidate, why in refused.items()}
        for name, line in map(lambda line: line.split(": ", 1), refusal_lines(values)):
            where.setdefault((name, line), []).append(layer)
    for (names, line), layers in where.items():
        yield (
            f"for {engine}: {names} not considered for {len(layers)} of {len(sites)} layers"
            f" ({layers[0]}): {line}"
        )
    if bound.groups:
        alike = ((name.rpartition(".")[2] for name in group) for group in bound.groups)
        kinds = dict.fromkeys(", ".join(dict.fromkeys(leaves)) for leaves in alike)
        yield (
            f"for {engine}: {sum(map(len, bound.groups))} layers get the scheme of those that it"
            f" computes as one with them: {'; '.join(kinds)}"
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
