"""The tables. One row is one fact; the columns that make it unique are its key."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


def now() -> datetime:
    """Return the current time in UTC, without the zone, which SQLite cannot keep."""
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    """Base of every table of the project."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012


class DeviceRow(Base):
    """A fingerprint that timings belong to."""

    __tablename__ = "device"
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[dict[str, Any]]
    created: Mapped[datetime] = mapped_column(default=now)


class RooflineRow(Base):
    """The `Roofline` of a device."""

    __tablename__ = "roofline"
    device_key: Mapped[str] = mapped_column(ForeignKey("device.key"), primary_key=True)
    bandwidth_bytes_per_s: Mapped[float]
    flops_per_s: Mapped[dict[str, Any]]
    created: Mapped[datetime] = mapped_column(default=now)


TIMING_KEY = (
    "device_key",
    "protocol",
    "n",
    "k",
    "bias",
    "dtype",
    "m",
    "format",
    "kernel",
    "working_set_bytes",
)
"""Everything that could change a timing: columns of `TimingRow`."""


class TimingRow(Base):
    """One `Measurement`."""

    __tablename__ = "timing"
    __table_args__ = (UniqueConstraint(*TIMING_KEY),)
    id: Mapped[int] = mapped_column(primary_key=True)
    device_key: Mapped[str] = mapped_column(ForeignKey("device.key"))
    protocol: Mapped[str]
    n: Mapped[int]
    k: Mapped[int]
    bias: Mapped[bool]
    dtype: Mapped[str]
    m: Mapped[int]
    format: Mapped[str]
    kernel: Mapped[str]
    working_set_bytes: Mapped[int]
    outcome: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    latency_us: Mapped[float | None]
    samples_us: Mapped[list[Any]]
    relative_error: Mapped[float | None]
    created: Mapped[datetime] = mapped_column(default=now)


class ModelRow(Base):
    """A model by the hash of its content, and where it was last read from."""

    __tablename__ = "model"
    hash: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[dict[str, Any]]
    created: Mapped[datetime] = mapped_column(default=now)


class LossRow(Base):
    """The loss of changing one layer, by one method on one text."""

    __tablename__ = "loss"
    __table_args__ = (UniqueConstraint("model_hash", "quality_key", "method", "layer", "numerics"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    model_hash: Mapped[str] = mapped_column(ForeignKey("model.hash"))
    quality_key: Mapped[str]
    method: Mapped[str]
    layer: Mapped[str]
    numerics: Mapped[str]
    loss: Mapped[float]
    created: Mapped[datetime] = mapped_column(default=now)


class StudyRow(Base):
    """One search: a model, a device, a workload and a text.

    Limits are not part of its identity, because they can be solved for again. `problem` holds the
    options of every layer. It is large, so it is read only when asked for.
    """

    __tablename__ = "study"
    id: Mapped[str] = mapped_column(primary_key=True)
    model_hash: Mapped[str] = mapped_column(ForeignKey("model.hash"))
    device_key: Mapped[str] = mapped_column(ForeignKey("device.key"))
    identity: Mapped[dict[str, Any]]
    workload: Mapped[dict[str, Any]]
    limits: Mapped[dict[str, Any]]
    recording: Mapped[dict[str, Any] | None]
    problem: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    recommended: Mapped[str | None]
    complete: Mapped[bool] = mapped_column(default=False)
    spent_s: Mapped[float] = mapped_column(default=0.0)
    created: Mapped[datetime] = mapped_column(default=now)
    updated: Mapped[datetime] = mapped_column(default=now, onupdate=now)


class PlanRow(Base):
    """One plan of a study."""

    __tablename__ = "plan"
    id: Mapped[str] = mapped_column(primary_key=True)
    study_id: Mapped[str] = mapped_column(ForeignKey("study.id"), index=True)
    label: Mapped[str]
    kind: Mapped[str]
    model_hash: Mapped[str]
    dtype: Mapped[str]
    layers: Mapped[list[Any]]
    prediction: Mapped[dict[str, Any]]
    created: Mapped[datetime] = mapped_column(default=now)


class ProofRow(Base):
    """The `Proof` of a plan, or the reason why it could not be proven."""

    __tablename__ = "proof"
    plan_id: Mapped[str] = mapped_column(ForeignKey("plan.id"), primary_key=True)
    outcome: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    proof: Mapped[dict[str, Any] | None]
    created: Mapped[datetime] = mapped_column(default=now)


class DeliveryRow(Base):
    """The `Delivery` of a plan."""

    __tablename__ = "delivery"
    plan_id: Mapped[str] = mapped_column(ForeignKey("plan.id"), primary_key=True)
    delivery: Mapped[dict[str, Any]]
    created: Mapped[datetime] = mapped_column(default=now)


class TaskScoreRow(Base):
    """One `TaskScore`.

    The subject is a plan's id, or the hash of the unquantized model. A limit of 0 means none.
    """

    __tablename__ = "task_score"
    __table_args__ = (
        UniqueConstraint("subject", "dtype", "task", "metric", "samples_limit", "lm_eval_version"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    subject: Mapped[str]
    dtype: Mapped[str]
    task: Mapped[str]
    metric: Mapped[str]
    samples_limit: Mapped[int]
    lm_eval_version: Mapped[str]
    value: Mapped[float]
    stderr: Mapped[float | None]
    samples: Mapped[int | None]
    created: Mapped[datetime] = mapped_column(default=now)


class ReferenceRow(Base):
    """What else is known of a study, by name.

    Examples are its command line, and the text that its weights are rounded for.
    """

    __tablename__ = "reference"
    __table_args__ = (UniqueConstraint("study_id", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[str] = mapped_column(ForeignKey("study.id"))
    name: Mapped[str]
    value: Mapped[dict[str, Any]]
    created: Mapped[datetime] = mapped_column(default=now)
