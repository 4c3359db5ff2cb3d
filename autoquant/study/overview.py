"""All studies of a database, one row each. No torch."""

from __future__ import annotations

from typing import Any

from autoquant.store import Store
from autoquant.study.study import Study


def study_rows(store: Store) -> list[dict[str, Any]]:
    """Say what each study is about and how far it has come, the one last worked on first.

    `source` is where the model was read from, `proven` the number of proven plans, and
    `recommended` the id of the best plan within the study's own limits, or None.
    """
    return [_row(Study(store, study_id)) for study_id in store.studies()]


def _row(study: Study) -> dict[str, Any]:
    facts = study.facts
    recommended = study.recommended()
    return {
        "study_id": facts.study_id,
        "source": dict(facts.source),
        "model_hash": facts.model_hash,
        "device": facts.device,
        "workload": facts.workload,
        "limits": dict(facts.limits),
        "constraints": facts.constraints,
        "proven": len(study.proofs()),
        "complete": facts.complete,
        "recommended": recommended.plan_id if recommended is not None else None,
    }
