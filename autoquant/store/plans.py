"""Plans, their proofs and their deliveries."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from autoquant.errors import PlanError
from autoquant.records import (
    Delivery,
    Plan,
    Proof,
    Workload,
)
from autoquant.store.rows import (
    plan_from,
)
from autoquant.store.schema import (
    DeliveryRow,
    PlanRow,
    ProofRow,
    StudyRow,
)
from autoquant.store.transactions import Transactions, name_of


class Plans(Transactions):
    """What a search proposed, and how it turned out."""

    def put_plan(self, plan: Plan) -> None:
        """Save `plan`. It replaces one of the same id, whose predictions may be older."""
        with self._writing() as session:
            session.merge(
                PlanRow(
                    id=plan.plan_id,
                    study_id=plan.study_id,
                    label=plan.label,
                    kind=plan.kind,
                    model_hash=plan.model_hash,
                    dtype=plan.dtype,
                    layers=plan.layers,
                    prediction=plan.prediction,
                    kv_cache=plan.kv_cache,
                )
            )

    def plans(self, study_id: str) -> list[Plan]:
        """Return all plans of a study, oldest first."""
        with self._session() as session:
            rows = session.scalars(
                select(PlanRow).filter_by(study_id=study_id).order_by(PlanRow.created, PlanRow.id)
            ).all()
            if not rows:
                return []
            workload = _workload(session, study_id)
            return [plan_from(row, workload) for row in rows]

    def plan(self, plan_id: str) -> Plan:
        """Return the plan whose id starts with `plan_id`.

        Raises:
            PlanError: No id does, or several do.
        """
        with self._session() as session:
            starts = PlanRow.id.startswith(plan_id, autoescape=True)
            rows = session.scalars(select(PlanRow).where(starts)).all() if plan_id else []
            if len(rows) != 1:
                what = "no plan" if not rows else f"{len(rows)} plans"
                where = name_of(self.engine)
                raise PlanError(
                    f"{what} with id {plan_id!r}: `autoquant pareto {where}` lists the plans of a"
                    " search"
                )
            return plan_from(rows[0], _workload(session, rows[0].study_id))

    def put_proof(
        self, plan_id: str, proof: Proof | None, reason: str = "", *, replaces: bool = False
    ) -> Proof | None:
        """Save how a plan's proof ended.

        Args:
            replaces: Also in place of a proof that is there.

        Returns:
            The proof that the store holds: what another process has saved meanwhile stays, unless
            it could not prove the plan.
        """
        with self._writing() as session:
            row = session.get(ProofRow, plan_id)
            if row is not None and row.proof is not None and not replaces:
                return row.proof
            session.merge(
                ProofRow(
                    plan_id=plan_id,
                    outcome="ok" if proof else "failed",
                    reason=reason,
                    proof=proof,
                )
            )
            return proof

    def proofs(self, study_id: str) -> dict[str, Proof]:
        """Return the proofs by plan id."""
        with self._session() as session:
            rows = session.scalars(
                select(ProofRow)
                .join(PlanRow, PlanRow.id == ProofRow.plan_id)
                .filter(PlanRow.study_id == study_id)
            )
            return {row.plan_id: row.proof for row in rows if row.proof is not None}

    def failed_proofs(self, study_id: str) -> dict[str, str]:
        """Return why plans could not be proven, by plan id."""
        with self._session() as session:
            rows = session.scalars(
                select(ProofRow)
                .join(PlanRow, PlanRow.id == ProofRow.plan_id)
                .filter(PlanRow.study_id == study_id)
            )
            return {row.plan_id: row.reason for row in rows if row.proof is None}

    def put_delivery(self, delivery: Delivery) -> None:
        """Save a delivery, and replace an earlier one of the plan."""
        with self._writing() as session:
            session.merge(DeliveryRow(plan_id=delivery.plan_id, delivery=delivery))

    def deliveries(self, study_id: str) -> dict[str, Delivery]:
        """Return the deliveries by plan id."""
        with self._session() as session:
            rows = session.scalars(
                select(DeliveryRow)
                .join(PlanRow, PlanRow.id == DeliveryRow.plan_id)
                .filter(PlanRow.study_id == study_id)
                .order_by(DeliveryRow.created)
            )
            return {row.plan_id: row.delivery for row in rows}

    def forget_deliveries(self, plan_ids: Iterable[str]) -> None:
        with self._writing() as session:
            session.execute(delete(DeliveryRow).where(DeliveryRow.plan_id.in_(list(plan_ids))))


def _workload(session: Session, study_id: str) -> Workload:
    """Return what a study is for."""
    return session.scalars(select(StudyRow.workload).filter_by(id=study_id)).one()
