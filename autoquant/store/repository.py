"""Read and write facts, one transaction each. Only the store knows the tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any, cast

from sqlalchemy import Engine, delete, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from autoquant.errors import PlanError, StoreError
from autoquant.records import (
    Delivery,
    Device,
    LayerChoice,
    Measurement,
    Plan,
    Proof,
    Roofline,
    TaskScore,
    TimingSubject,
    Workload,
)
from autoquant.store.columns import BadValueError
from autoquant.store.integrity import damaged, is_damage
from autoquant.store.log import check_and_begin_log
from autoquant.store.refused import refusal
from autoquant.store.rows import (
    CALIBRATION,
    StudyFacts,
    check_problem,
    measurement_from,
    plan_from,
    study_from,
    task_score_from,
)
from autoquant.store.schema import (
    TIMING_KEY,
    DeliveryRow,
    DeviceRow,
    LossRow,
    ModelRow,
    PlanRow,
    ProofRow,
    ReferenceRow,
    RooflineRow,
    StudyRow,
    TaskScoreRow,
    TimingRow,
    now,
)
from autoquant.store.shapes import LimitsObject


@contextmanager
def transaction(engine: Engine, *, writes: bool = False) -> Iterator[Session]:
    """Open a session that is committed at the end, or rolled back if something raises.

    Args:
        writes: Wait at the beginning until no other process writes. SQLite refuses to write after
            reading in one transaction if another process wrote in between.

    Raises:
        StoreError: The database refused a statement, or a row that was read is damaged.
    """
    try:
        if writes:
            check_and_begin_log(engine)
        with Session(engine.execution_options(writes=writes)) as session, session.begin():
            yield session
    except BadValueError as error:
        raise damaged(engine.url.database, str(error)) from error
    except DatabaseError as error:
        if is_damage(error):
            raise damaged(engine.url.database, str(error.orig)) from error
        raise StoreError(refusal(error, engine.url.database)) from error


class Store:
    """Facts under their keys, in one database.

    Args:
        engine: From `autoquant.store.open_store`, which checks and migrates the schema.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def close(self) -> None:
        self.engine.dispose()

    def _session(self) -> AbstractContextManager[Session]:
        return transaction(self.engine)

    def _writing(self) -> AbstractContextManager[Session]:
        return transaction(self.engine, writes=True)

    # -- devices and timings -----------------------------------------------------------------------

    def put_device(self, device: Device) -> None:
        with self._writing() as session:
            session.merge(DeviceRow(key=device.key, fingerprint=device))

    def roofline(self, device: Device) -> Roofline | None:
        """Return the measured limits of `device`, or None."""
        with self._session() as session:
            row = session.get(RooflineRow, device.key)
            if row is None:
                return None
            return Roofline(
                bandwidth_bytes_per_s=row.bandwidth_bytes_per_s, flops_per_s=row.flops_per_s
            )

    def put_roofline(self, device: Device, roofline: Roofline) -> None:
        with self._writing() as session:
            session.merge(RooflineRow(device_key=device.key, **asdict(roofline)))

    def timings(self, device: Device, protocol: str) -> dict[TimingSubject, Measurement]:
        """Return every measurement made on `device` under `protocol`."""
        with self._session() as session:
            rows = session.scalars(
                select(TimingRow).filter_by(device_key=device.key, protocol=protocol)
            )
            return {measurement.subject: measurement for measurement in map(measurement_from, rows)}

    def put_timings(
        self, device: Device, protocol: str, measurements: Iterable[Measurement]
    ) -> list[Measurement]:
        """Save measurements that were made in turn, all or none of them.

        Returns:
            The measurements that the store holds of their subjects. What another process has saved
            meanwhile stays.
        """
        kept = []
        with self._writing() as session:
            for measurement in measurements:
                fresh = _timing_row(device, protocol, measurement)
                row = session.scalars(select(TimingRow).filter_by(**_timing_key(fresh))).first()
                if row is None:
                    row = fresh
                    session.add(row)
                kept.append(measurement_from(row))
        return kept

    def replace_timings(
        self, device: Device, protocol: str, measurements: Iterable[Measurement]
    ) -> None:
        """Save measurements in place of those of the same subjects, all or none of them."""
        with self._writing() as session:
            for measurement in measurements:
                row = _timing_row(device, protocol, measurement)
                session.execute(delete(TimingRow).filter_by(**_timing_key(row)))
                session.add(row)

    # -- models and losses -------------------------------------------------------------------------

    def put_model(self, model_hash: str, source: Mapping[str, Any]) -> None:
        with self._writing() as session:
            session.merge(ModelRow(hash=model_hash, source=dict(source)))

    def losses(
        self, model_hash: str, quality_key: str, method: str
    ) -> dict[tuple[str, str], float]:
        """Return the losses of single layers by (layer, numerics)."""
        with self._session() as session:
            rows = session.scalars(
                select(LossRow).filter_by(
                    model_hash=model_hash, quality_key=quality_key, method=method
                )
            )
            return {(row.layer, row.numerics): row.loss for row in rows}

    def put_losses(
        self,
        model_hash: str,
        quality_key: str,
        method: str,
        losses: Mapping[tuple[str, str], float],
    ) -> None:
        """Save the losses of one pass over the text, all or none of them.

        What another process has saved meanwhile stays.
        """
        of = {"model_hash": model_hash, "quality_key": quality_key, "method": method}
        with self._writing() as session:
            for (layer, numerics), loss in losses.items():
                key = {**of, "layer": layer, "numerics": numerics}
                if session.scalars(select(LossRow).filter_by(**key)).first() is None:
                    session.add(LossRow(**key, loss=loss))

    # -- studies -----------------------------------------------------------------------------------

    def put_study(
        self,
        study_id: str,
        *,
        model_hash: str,
        device: Device,
        identity: Mapping[str, Any],
        workload: Workload,
        limits: Mapping[str, Any],
    ) -> None:
        """Create the study, or set new limits of an existing one."""
        with self._writing() as session:
            row = session.get(StudyRow, study_id)
            if row is None:
                session.add(
                    StudyRow(
                        id=study_id,
                        model_hash=model_hash,
                        device_key=device.key,
                        identity=dict(identity),
                        workload=workload,
                        limits=dict(limits),
                    )
                )
            else:
                row.limits = cast(LimitsObject, dict(limits))

    def update_study(self, study_id: str, **columns: Any) -> None:
        """Set columns of `StudyRow`: recording, problem, recommended, complete or spent_s."""
        with self._writing() as session:
            row = session.get(StudyRow, study_id)
            if row is None:
                raise PlanError(f"no study {study_id} in this database")
            for name, value in columns.items():
                setattr(row, name, value)

    def put_options(
        self,
        study_id: str,
        options: Sequence[Sequence[LayerChoice]],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Save what plans are solved from.

        Args:
            options: The choices of every layer, with their predictions.
            about: What all plans have in common.
        """
        layers = [list(layer) for layer in options]
        self.update_study(study_id, problem={"options": layers, "about": dict(about or {})})

    def options(self, study_id: str) -> dict[str, list[LayerChoice]] | None:
        """Return the choices that plans are solved from by layer name, or None before solving."""
        return self.options_and_about(study_id)[0]

    def options_and_about(
        self, study_id: str
    ) -> tuple[dict[str, list[LayerChoice]] | None, dict[str, Any]]:
        """Return `options`, and what all plans have in common (empty if unknown)."""
        with self._session() as session:
            row = session.get(StudyRow, study_id)
            problem = None if row is None else row.problem
            if row is None or problem is None:
                return None, {}
            check_problem(problem, row.workload, study_id)
        options = {layer[0].name: layer for layer in problem["options"]}
        return options, dict(problem.get("about") or {})

    def studies(self) -> list[str]:
        """Return the study ids, the latest first."""
        with self._session() as session:
            return list(session.scalars(select(StudyRow.id).order_by(StudyRow.updated.desc())))

    def study(self, study_id: str | None = None) -> StudyFacts:
        """Return a study, or the latest one for None.

        Raises:
            PlanError: The study does not exist.
        """
        with self._session() as session:
            if study_id is None:
                row = session.scalars(
                    select(StudyRow).order_by(StudyRow.updated.desc()).limit(1)
                ).first()
            else:
                row = session.get(StudyRow, study_id)
            if row is None:
                known = ", ".join(session.scalars(select(StudyRow.id)))
                raise PlanError(
                    f"no study {study_id!r} here; studies: {known or 'none'}"
                    if study_id
                    else "this database holds no study yet: run `autoquant search` first"
                )
            model = session.get_one(ModelRow, row.model_hash)
            device = session.get_one(DeviceRow, row.device_key)
            calibration = session.scalars(
                select(ReferenceRow).filter_by(study_id=row.id, name=CALIBRATION)
            ).first()
            return study_from(
                row, model, device, calibration.value["windows"] if calibration else None
            )

    def put_calibration(self, study_id: str, windows: Sequence[Sequence[int]]) -> None:
        """Save the token ids that the study's weights are rounded for."""
        self.put_reference(study_id, CALIBRATION, {"windows": [list(window) for window in windows]})

    def put_reference(self, study_id: str, name: str, value: Mapping[str, Any]) -> None:
        """Save `value` under a name of the study, and replace an earlier value."""
        with self._writing() as session:
            row = session.scalars(
                select(ReferenceRow).filter_by(study_id=study_id, name=name)
            ).first()
            if row is None:
                session.add(ReferenceRow(study_id=study_id, name=name, value=dict(value)))
            else:
                row.value = dict(value)

    def references(self, study_id: str) -> dict[str, dict[str, Any]]:
        """Return what else is known of a study, by name."""
        with self._session() as session:
            return {
                row.name: row.value
                for row in session.scalars(select(ReferenceRow).filter_by(study_id=study_id))
            }

    # -- plans and proofs --------------------------------------------------------------------------

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
            rows = session.scalars(
                select(PlanRow).where(PlanRow.id.startswith(plan_id, autoescape=True))
            ).all()
            if len(rows) != 1:
                what = "no plan" if not rows else f"{len(rows)} plans"
                where = self.engine.url.database or "PLAN.DB"
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

    # -- tasks -------------------------------------------------------------------------------------

    def put_task_scores(self, subject: str, dtype: str, scores: Iterable[TaskScore]) -> None:
        """Save task scores, and replace earlier ones of the same measurement.

        Args:
            subject: Id of a plan, or content hash of the unquantized model.
        """
        with self._writing() as session:
            for score in scores:
                columns = asdict(score)
                columns["samples_limit"] = columns.pop("limit") or 0
                found = {name: columns.pop(name) for name in ("value", "stderr", "samples")}
                key = {"subject": subject, "dtype": dtype, **columns}
                row = session.scalars(select(TaskScoreRow).filter_by(**key)).first()
                if row is None:
                    session.add(TaskScoreRow(**key, **found))
                else:
                    row.value, row.stderr, row.samples, row.created = *found.values(), now()

    def task_scores(self, subject: str, dtype: str) -> list[TaskScore]:
        """Return the task scores of a subject, the first measured first.

        Args:
            subject: Id of a plan, or content hash of the unquantized model.
        """
        with self._session() as session:
            rows = session.scalars(
                select(TaskScoreRow)
                .filter_by(subject=subject, dtype=dtype)
                .order_by(TaskScoreRow.id)
            )
            return [task_score_from(row) for row in rows]


def _workload(session: Session, study_id: str) -> Workload:
    """Return what a study is for."""
    return session.scalars(select(StudyRow.workload).filter_by(id=study_id)).one()


def _timing_key(row: TimingRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in TIMING_KEY}


def _timing_row(device: Device, protocol: str, measurement: Measurement) -> TimingRow:
    subject = measurement.subject
    return TimingRow(
        device_key=device.key,
        protocol=protocol,
        **asdict(subject.shape),
        m=subject.m,
        format=subject.format,
        kernel=subject.kernel,
        working_set_bytes=subject.working_set_bytes,
        outcome=measurement.outcome,
        reason=measurement.reason,
        latency_us=measurement.latency_us if measurement.samples_us else None,
        samples_us=measurement.samples_us,
        relative_error=measurement.relative_error,
    )
