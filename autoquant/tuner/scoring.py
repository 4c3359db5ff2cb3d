"""Score changes of layers: predict what each costs, or take it from the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoquant.candidates import A16, get_format
from autoquant.candidates.experts import cannot_hold_experts
from autoquant.candidates.formats.floats import original_format
from autoquant.evaluators.sensitivity import EVERY_LAYER, Change, Sensitivity
from autoquant.events import Listener, Notice, StageFinished, StageProgress, StageStarted
from autoquant.records import LOOKUP
from autoquant.solver.additivity import LossMap, fit_loss_map, together_pairs
from autoquant.store import Store
from autoquant.tuner.choices import SiteChoices, numerics_of
from autoquant.tuner.workers.again import run_again
from autoquant.tuner.workers.crew import begin, count
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import Scored, ScoreJob


@dataclass(frozen=True, slots=True)
class Scores:
    """Losses of changes.

    Attributes:
        losses: By (site name, text of the numerics).
        loss_map: From summed losses to the loss of a plan.
    """

    losses: Mapping[tuple[str, str], float]
    loss_map: LossMap


def score(
    choices: Sequence[SiteChoices],
    *,
    method: Sensitivity,
    model_hash: str,
    quality_key: str,
    device_type: str,
    runner: Runner,
    store: Store,
    listener: Listener,
) -> Scores:
    """Score the changes that the choices need and the store does not know.

    Args:
        quality_key: Names the measure of quality. Losses by another measure are not used.
    """
    known = store.losses(model_hash, quality_key, method.version)
    if method.together:
        changes = _changes_together(choices, known, device_type)
        steps = {change.numerics for change in changes}
    else:
        changes = [c for c in _changes(choices) if (c.site.name, c.numerics) not in known]
        steps = {change.site.name for change in changes}
    exact = _exact(changes)
    if exact:
        store.put_losses(model_hash, quality_key, method.version, exact)
        changes = [change for change in changes if (change.site.name, change.numerics) not in exact]
        steps -= {numerics for _, numerics in exact}
    listener(StageStarted("score", len(steps)))
    scored: set[str] = set()

    def on_message(message: Scored | Notice) -> None:
        if isinstance(message, Notice):
            return listener(message)
        scored.add(message.subject)
        new = {key: loss for key, loss in message.losses.items() if key not in known}
        store.put_losses(model_hash, quality_key, method.version, new)
        return listener(StageProgress("score", len(scored), message.subject))

    jobs = [ScoreJob.of(method, share) for share in _shares(changes, method, count(runner))]
    begun = [begin(runner, job, on_message) for job in jobs]
    for job, each in zip(jobs, begun, strict=True):
        run_again(runner, job, on_message, listener, each)
    losses = store.losses(model_hash, quality_key, method.version)
    # A table is one layer: changing it says nothing of how layers act together.
    linears = {key: loss for key, loss in losses.items() if not key[1].endswith(f"+{LOOKUP}")}
    loss_map = fit_loss_map(together_pairs(linears, EVERY_LAYER))
    listener(StageFinished("score", _summary(method, changes, len(known), loss_map)))
    return Scores({key: loss for key, loss in losses.items() if key[0] != EVERY_LAYER}, loss_map)


def _shares(changes: Sequence[Change], method: Sensitivity, workers: int) -> list[list[Change]]:
    """Return the changes dealt out to so many workers. What is scored together stays together."""
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault(change.numerics if method.together else change.site.name, []).append(
            change
        )
    dealt = [list(groups.values())[first::workers] for first in range(workers)]
    return [[change for group in share for change in group] for share in dealt if share]


def _exact(changes: Sequence[Change]) -> dict[tuple[str, str], float]:
    """Return the losses of numerics that leave every weight as it is, which are 0."""
    other = {change.numerics for change in changes if not _is_original(change)}
    names = [EVERY_LAYER, *(change.site.name for change in changes)]
    exact = {change.numerics for change in changes} - other
    return {(name, numerics): 0.0 for numerics in exact for name in dict.fromkeys(names)}


def _is_original(change: Change) -> bool:
    original = get_format(original_format(change.site.shape.dtype))
    return change.format.values == original.values and change.activation in (A16, LOOKUP)


def _summary(method: Sensitivity, changes: Sequence[Change], known: int, loss_map: LossMap) -> str:
    sites = len({change.site.name for change in changes})
    scored = f"{len(changes)} changes of {sites} layers scored now, {known} known"
    text = f"sensitivity {method.id}: {scored}"
    if loss_map.curvature:
        text += f"; a sum of 0.1 predicts {loss_map.plan_loss(0.1):.3g}"
    return text


def _changes(choices: Sequence[SiteChoices]) -> list[Change]:
    """Return the changes that choices need, site by site."""
    found: dict[tuple[str, str], Change] = {}
    for of_site in choices:
        for choice in of_site.choices:
            fmt = get_format(choice.format)
            for numerics in numerics_of(choice):
                key = str(numerics)
                change = Change(of_site.site, key, fmt, numerics.activation)
                found.setdefault((of_site.site.name, key), change)
    return list(found.values())


def _changes_together(
    choices: Sequence[SiteChoices], known: Mapping[tuple[str, str], float], device_type: str
) -> list[Change]:
    """Return each unknown numerics that some choice uses, at every site whose shape it takes.

    What is changed together must not depend on which choices are left after timing.
    """
    used: dict[str, Change] = {}
    for change in _changes(choices):
        used.setdefault(change.numerics, change)
    return [
        Change(of_site.site, key, change.format, change.activation)
        for key, change in used.items()
        if (EVERY_LAYER, key) not in known
        for of_site in choices
        if of_site.site.lookup == (change.activation == LOOKUP)
        and change.format.unsupported(of_site.site.shape, 1, device_type) is None
        and not (of_site.site.experts > 1 and cannot_hold_experts(change.format, device_type))
    ]
