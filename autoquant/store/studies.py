"""Studies: what was asked for, what was recorded, and what plans are solved from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sqlalchemy import select

from autoquant.errors import PlanError
from autoquant.records import (
    Device,
    LayerChoice,
    Workload,
)
from autoquant.store.rows import (
    CALIBRATION,
    StudyFacts,
    check_problem,
    study_from,
)
from autoquant.store.schema import (
    DeviceRow,
    ModelRow,
    ReferenceRow,
    StudyRow,
)
from autoquant.store.shapes import LimitsObject
from autoquant.store.transactions import Transactions


class Studies(Transactions):
    """What belongs to one search, apart from its plans."""

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
        """Set columns of `StudyRow`: recording, problem, recommended, complete or spent_s.

        Raises:
            PlanError: There is no such study.
        """
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
                    if study_id is not None
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
