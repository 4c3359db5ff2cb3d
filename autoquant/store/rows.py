"""Rows of the tables as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from autoquant.records import (
    Device,
    LinearShape,
    Measurement,
    Outcome,
    Plan,
    PlanKind,
    Prediction,
    Recording,
    TaskScore,
    TimingSubject,
    Workload,
)
from autoquant.store.json_records import layer_from, recording_from, workload_from
from autoquant.store.schema import DeviceRow, ModelRow, PlanRow, StudyRow, TaskScoreRow, TimingRow


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFacts:
    """What the store knows of a study.

    Attributes:
        calibration: Token ids `[windows, tokens]` that weights were rounded for; None where the search tried no such format.
    """

    study_id: str
    model_hash: str
    source: Mapping[str, Any]
    device: Device
    identity: Mapping[str, Any]
    workload: Workload
    limits: Mapping[str, Any]
    recording: Recording | None
    recommended: str | None
    complete: bool
    spent_s: float
    calibration: Sequence[Sequence[int]] | None = None


def measurement_from(row: TimingRow) -> Measurement:
    """Rebuild a `Measurement` from its row."""
    subject = TimingSubject(
        shape=LinearShape(n=row.n, k=row.k, bias=row.bias, dtype=row.dtype),
        m=row.m,
        format=row.format,
        kernel=row.kernel,
        working_set_bytes=row.working_set_bytes,
    )
    return Measurement(
        subject=subject,
        outcome=cast(Outcome, row.outcome),
        reason=row.reason,
        samples_us=tuple(row.samples_us),
        relative_error=row.relative_error,
    )


def study_from(
    row: StudyRow, model: ModelRow, device: DeviceRow, calibration: Sequence[Sequence[int]] | None
) -> StudyFacts:
    return StudyFacts(
        study_id=row.id,
        model_hash=row.model_hash,
        source=model.source,
        device=Device(**device.fingerprint),
        identity=row.identity,
        workload=workload_from(row.workload),
        limits=row.limits,
        recording=recording_from(row.recording) if row.recording else None,
        recommended=row.recommended,
        complete=row.complete,
        spent_s=row.spent_s,
        calibration=calibration,
    )


def task_score_from(row: TaskScoreRow) -> TaskScore:
    return TaskScore(
        task=row.task,
        metric=row.metric,
        value=row.value,
        stderr=row.stderr,
        samples=row.samples,
        limit=row.samples_limit or None,
        lm_eval_version=row.lm_eval_version,
    )


def plan_from(row: PlanRow) -> Plan:
    return Plan(
        plan_id=row.id,
        study_id=row.study_id,
        label=row.label,
        kind=cast(PlanKind, row.kind),
        model_hash=row.model_hash,
        dtype=row.dtype,
        layers=tuple(layer_from(layer) for layer in row.layers),
        prediction=Prediction(**row.prediction),
    )
