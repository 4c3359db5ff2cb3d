"""Convert rows of the tables to records, and records to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from autoquant.records import (
    Delivery,
    Device,
    Interval,
    LayerChoice,
    LinearShape,
    Measurement,
    Outcome,
    Phase,
    Plan,
    PlanKind,
    Prediction,
    Proof,
    Recording,
    RouteStep,
    RunTimes,
    Site,
    SiteUse,
    Skipped,
    TaskScore,
    TimingSubject,
    Workload,
)
from autoquant.store.schema import DeviceRow, ModelRow, PlanRow, StudyRow, TaskScoreRow, TimingRow


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFacts:
    """What the store knows of a study.

    Attributes:
        calibration: Token ids `[windows, tokens]` that weights were rounded for, or None if the
            search tried no such format.
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


def plain(record: Any) -> dict[str, Any]:
    """Return a record as dicts and lists that JSON can hold."""
    return cast(dict[str, Any], json.loads(to_json(record)))


def to_json(record: Any) -> str:
    """Return a record as JSON."""
    return json.dumps(asdict(record), separators=(",", ":"))


def _shape(data: Mapping[str, Any]) -> LinearShape:
    return LinearShape(**data)


def site_from(data: Mapping[str, Any]) -> Site:
    return Site(
        name=data["name"],
        parameters=tuple(data["parameters"]),
        shape=_shape(data["shape"]),
        uses=tuple(SiteUse(**use) for use in data["uses"]),
        kept=tuple(data["kept"]),
        siblings=tuple(data["siblings"]),
    )


def recording_from(data: Mapping[str, Any]) -> Recording:
    """Rebuild a `Recording` from its JSON object."""
    return Recording(
        sites=tuple(site_from(site) for site in data["sites"]),
        skipped=tuple(Skipped(**skipped) for skipped in data["skipped"]),
        weights_share=data["weights_share"],
        flops_share=data["flops_share"],
        parameter_bytes=data["parameter_bytes"],
    )


def workload_from(data: Mapping[str, Any]) -> Workload:
    """Rebuild a `Workload` from its JSON object."""
    return Workload(phases=tuple(Phase(**phase) for phase in data["phases"]), batch=data["batch"])


def layer_from(data: Mapping[str, Any]) -> LayerChoice:
    """Rebuild a `LayerChoice` from its JSON object."""
    rest = {
        key: value
        for key, value in data.items()
        if key not in ("shape", "route", "parameters", "joined")
    }
    return LayerChoice(
        shape=_shape(data["shape"]),
        route=tuple(RouteStep(**step) for step in data["route"]),
        parameters=tuple(data["parameters"]),
        joined=tuple(data.get("joined", ())),
        **rest,
    )


def proof_from(data: Mapping[str, Any]) -> Proof:
    """Rebuild a `Proof` from its JSON object."""
    rest = dict(data)
    for name in ("increase", "selection_increase", "selection_kl", "time_ratio"):
        rest[name] = Interval(**rest[name]) if rest.get(name) else None
    for name in ("notes", "selection_losses"):
        rest[name] = tuple(rest.get(name, ()))
    return Proof(**rest)


def delivery_from(data: Mapping[str, Any]) -> Delivery:
    """Rebuild a `Delivery` from its JSON object."""
    rest = dict(data) | {"notes": tuple(data["notes"])}
    for name in ("times", "original_times"):
        rest[name] = RunTimes(**rest[name]) if rest[name] else None
    rest["ratio"] = Interval(**rest["ratio"]) if rest["ratio"] else None
    return Delivery(**rest)
