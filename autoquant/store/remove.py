"""Remove a study.

Timings, rooflines, losses and task scores of the unquantized model stay, because they belong to
devices and models.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.orm import Session

from autoquant.errors import PlanError
from autoquant.store.repository import Store
from autoquant.store.schema import (
    Base,
    DeliveryRow,
    PlanRow,
    ProofRow,
    ReferenceRow,
    StudyRow,
    TaskScoreRow,
)
from autoquant.store.transactions import transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovedRows:
    """How many rows were removed with a study."""

    plans: int
    proofs: int
    deliveries: int
    references: int
    task_scores: int


def find_study(store: Store, beginning: str) -> str:
    """Return the only study id that starts with `beginning`.

    Raises:
        PlanError: No id does, or several do.
    """
    known = store.studies()
    if not beginning:
        raise PlanError(f"an empty id names no study; studies: {', '.join(known) or 'none'}")
    found = [study_id for study_id in known if study_id.startswith(beginning)]
    if beginning in found:
        return beginning
    if len(found) != 1:
        what = "no study" if not found else f"{len(found)} studies"
        raise PlanError(
            f"{what} with id {beginning!r} here; studies: {', '.join(found or known) or 'none'}"
        )
    return found[0]


def remove_study(store: Store, study_id: str) -> RemovedRows:
    """Delete a study, its plans and their measurements in one transaction."""
    plans = select(PlanRow.id).filter_by(study_id=study_id)
    with transaction(store.engine, writes=True) as session:
        removed = RemovedRows(
            plans=_count(session, PlanRow, PlanRow.study_id == study_id),
            proofs=_count(session, ProofRow, ProofRow.plan_id.in_(plans)),
            deliveries=_count(session, DeliveryRow, DeliveryRow.plan_id.in_(plans)),
            references=_count(session, ReferenceRow, ReferenceRow.study_id == study_id),
            task_scores=_count(session, TaskScoreRow, TaskScoreRow.subject.in_(plans)),
        )
        session.execute(delete(TaskScoreRow).where(TaskScoreRow.subject.in_(plans)))
        session.execute(delete(DeliveryRow).where(DeliveryRow.plan_id.in_(plans)))
        session.execute(delete(ProofRow).where(ProofRow.plan_id.in_(plans)))
        session.execute(delete(PlanRow).where(PlanRow.study_id == study_id))
        session.execute(delete(ReferenceRow).where(ReferenceRow.study_id == study_id))
        session.execute(delete(StudyRow).where(StudyRow.id == study_id))
    return removed


def _count(session: Session, table: type[Base], condition: ColumnElement[bool]) -> int:
    return session.scalar(select(func.count()).select_from(table).where(condition)) or 0
