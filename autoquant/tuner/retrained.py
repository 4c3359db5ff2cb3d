"""Apply a plan to the weights of the searched model trained on, and measure its quality there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoquant.delivery.on_disk import AppliedReport, apply_to_disk
from autoquant.events import Listener, ignore
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import Plan
from autoquant.study.study import Study
from autoquant.tuner.judge import Asked
from autoquant.tuner.rejudge import Rejudge, study_quality


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainedReport:
    """A plan that was applied to other weights than those that were searched.

    Attributes:
        quality: What was measured, a line each.
        beyond: By how much it is beyond the limits of the search, or "".
    """

    applied: AppliedReport
    quality: tuple[str, ...]
    beyond: str


def apply_retrained(
    study: Study,
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    asked: Asked | None = None,
    listener: Listener = ignore,
    trust: Trust = NO_TRUST,
) -> RetrainedReport:
    """Apply a plan to a model with the layers of the one that was searched, and other weights.

    Weights are rounded anew, those rounded for their layers' inputs on the text of the search. The
    result is compared with the same weights unquantized, on the texts of the search. A result
    beyond the limits is written, and said to be.

    Args:
        asked: What judged the search, if not the text that autoquant ships.

    Raises what `apply_to_disk` raises, and:
        TextError: The search judged by another measure.
    """
    facts = study.facts
    words = study.store.references(study.study_id).get("judge", {}).get("words", "")
    asked = asked or Asked.of(None, None, None)
    judge = Rejudge(
        plan,
        None,
        facts,
        lambda loaded: study_quality(loaded, facts, asked, words),
        listener=listener,
    )
    report = apply_to_disk(
        plan,
        model,
        out,
        facts=facts,
        listener=listener,
        trust=trust,
        retrained=True,
        judge=judge,
    )
    assert judge.result is not None  # the model was judged
    return RetrainedReport(
        applied=report, quality=judge.words, beyond=judge.result.beyond(study.limits)
    )
