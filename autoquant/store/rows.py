"""Make records of rows, and check that what columns and rows say fits together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event

from autoquant.records import (
    Device,
    LayerChoice,
    LinearShape,
    Measurement,
    Plan,
    Recording,
    TaskScore,
    TimingSubject,
    Workload,
)
from autoquant.store.columns import BadValueError
from autoquant.store.schema import (
    Base,
    DeliveryRow,
    DeviceRow,
    ModelRow,
    PlanRow,
    ProofRow,
    ReferenceRow,
    StudyRow,
    TaskScoreRow,
    TimingRow,
)
from autoquant.store.shapes import REFERENCES, ProblemObject
from autoquant.typed import ShapeError, check

_LONGEST_LABEL = 1000
CALIBRATION = "calibration"
"""Name of the reference with the text that weights are rounded for."""


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

    @property
    def constraints(self) -> dict[str, Any]:
        """The options of the search for single layers, as they were given; empty without any."""
        return dict(self.identity.get("constraints") or {})


def measurement_from(row: TimingRow) -> Measurement:
    """Make a `Measurement` of its row."""
    subject = TimingSubject(
        shape=LinearShape(n=row.n, k=row.k, bias=row.bias, dtype=row.dtype),
        m=row.m,
        format=row.format,
        kernel=row.kernel,
        working_set_bytes=row.working_set_bytes,
    )
    return Measurement(
        subject=subject,
        outcome=row.outcome,
        reason=row.reason,
        samples_us=row.samples_us,
        relative_error=row.relative_error,
    )


def study_from(
    row: StudyRow, model: ModelRow, device: DeviceRow, calibration: Sequence[Sequence[int]] | None
) -> StudyFacts:
    return StudyFacts(
        study_id=row.id,
        model_hash=row.model_hash,
        source=dict(model.source),
        device=device.fingerprint,
        identity=dict(row.identity),
        workload=row.workload,
        limits=dict(row.limits),
        recording=row.recording,
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


def plan_from(row: PlanRow, workload: Workload) -> Plan:
    """Make a `Plan` of its row.

    Raises:
        BadValueError: Its layers do not fit together, or it predicts times of phases that the
            workload of its study does not have.
    """
    if len(row.label) > _LONGEST_LABEL:
        raise BadValueError(f"plan.label of {row.id} has {len(row.label)} characters")
    _check_layers(row.layers, f"plan.layers of {row.id}")
    check_phases((layer.latency_us for layer in row.layers), workload, f"plan {row.id}")
    return Plan(
        plan_id=row.id,
        study_id=row.study_id,
        label=row.label,
        kind=row.kind,
        model_hash=row.model_hash,
        dtype=row.dtype,
        layers=row.layers,
        prediction=row.prediction,
        kv_cache=row.kv_cache,
    )


def _check_layers(layers: Sequence[LayerChoice], place: str) -> None:
    """Check that a plan has layers, each once and with a way to compute it, alone or joined.

    Raises:
        BadValueError: It has not.
    """
    known = {layer.name: layer for layer in layers}
    if not layers or len(known) < len(layers):
        raise BadValueError(f"{place} has no layer, or one of them twice")
    for layer in layers:
        if not (layer.parameters and layer.route):
            raise BadValueError(f"{place}: {layer.name} has no parameter or no route")
        for name in layer.joined:
            other = known.get(name)
            if other is None or _way(other) != _way(layer):
                raise BadValueError(f"{place}: {layer.name} cannot be joined with {name}")


def _way(layer: LayerChoice) -> tuple[Any, ...]:
    """Return what layers have in common that are computed as one."""
    return layer.joined, layer.format, layer.route, layer.shape.k, layer.shape.dtype


def check_phases(times: Iterable[Mapping[str, float]], workload: Workload, place: str) -> None:
    """Check that times are of phases of a study's workload.

    Raises:
        BadValueError: They are of another phase.
    """
    phases = workload.calls().keys()
    for each in times:
        if unknown := each.keys() - phases:
            raise BadValueError(f"{place} has times of {min(unknown)!r}, which its study has not")


def check_problem(problem: ProblemObject, workload: Workload, study_id: str) -> None:
    """Check that what plans are solved from is of one set of layers and of one workload.

    Raises:
        BadValueError: It is not.
    """
    place = f"study.problem of {study_id}"
    layers = [layer[0].name for layer in problem["options"]]
    if not layers:
        raise BadValueError(f"{place} has no layer")
    known = set(layers)
    grouped = [name for group in (problem.get("about") or {}).get("groups", ()) for name in group]
    if len(known) < len(layers) or not known.issuperset(grouped):
        raise BadValueError(f"{place} names a layer twice, or one that is not there")
    for layer in problem["options"]:
        if any(choice.name != layer[0].name for choice in layer):
            raise BadValueError(f"{place} has options of several layers as those of one")
        check_phases((choice.latency_us for choice in layer), workload, place)


def check_in_study(row: Base, workloads: Mapping[str, Workload]) -> None:
    """Check what a row says of the phases of its study.

    Args:
        workloads: What each study is for, by its id.

    Raises:
        BadValueError: The study has other phases.
    """
    if isinstance(row, PlanRow):
        plan_from(row, workloads[row.study_id])
    elif isinstance(row, StudyRow) and row.problem is not None:
        check_problem(row.problem, row.workload, row.id)


@event.listens_for(Base, "load", propagate=True)
def _check_loaded(row: Base, _context: Any) -> None:
    """Check each row that is loaded as a whole."""
    check_row(row)


def check_row(row: Base) -> None:
    """Check that the columns of a row agree with one another.

    Raises:
        BadValueError: They do not.
    """
    if isinstance(row, ProofRow):
        if (row.outcome == "ok") != (row.proof is not None):
            raise BadValueError(f"proof of {row.plan_id}: {row.outcome}, but its proof says not so")
        if row.proof is not None and row.proof.plan_id != row.plan_id:
            raise BadValueError(f"proof of {row.plan_id} is one of {row.proof.plan_id}")
    elif isinstance(row, DeliveryRow) and row.delivery.plan_id != row.plan_id:
        raise BadValueError(f"delivery of {row.plan_id} is one of {row.delivery.plan_id}")
    elif isinstance(row, TimingRow) and row.outcome == "ok" and not row.samples_us:
        raise BadValueError(f"timing {row.id}: ok, but without samples")
    elif isinstance(row, ReferenceRow) and row.name in REFERENCES:
        try:
            check(REFERENCES[row.name], row.value)
        except ShapeError as error:
            raise BadValueError(f"reference {row.name} of {row.study_id}: {error}") from error
