"""The tables. One row is one fact; the columns that make it unique are its key."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    func,
    select,
    type_coerce,
)
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from autoquant.records import (
    Delivery,
    Device,
    KvCache,
    LayerChoice,
    Outcome,
    PlanKind,
    Prediction,
    Proof,
    Recording,
    Workload,
)
from autoquant.records.numbers import Count, Finite, NonNegative, Positive
from autoquant.store.columns import Checked
from autoquant.store.shapes import Identity, LimitsObject, ModelObject, ProblemObject

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


def now() -> datetime:
    """Return the current time in UTC, without the zone, which SQLite cannot keep."""
    return datetime.now(UTC).replace(tzinfo=None)


_NUMBERS = (Count, Positive)
# PostgreSQL's JSON has no infinity, which an interval may end at.
_RECORD = JSON().with_variant(Text(), "postgresql")
_LARGE = BigInteger().with_variant(Integer(), "sqlite")  # whose integers have 64 bits
_FLOATS = (Finite, NonNegative)
_RECORDS = (
    Device,
    LimitsObject,
    ModelObject,
    Identity,
    ProblemObject,
    Prediction,
    Proof,
    Delivery,
    Recording,
    Workload,
    tuple[LayerChoice, ...],
    tuple[NonNegative, ...],
    dict[str, NonNegative],
    dict[str, Any],
)
_TYPES: dict[Any, Any] = {
    str: Checked(String(), str),
    int: Checked(Integer(), int),
    float: Checked(Double(), float),
    bool: Checked(Boolean(), bool),
    datetime: Checked(DateTime(), datetime),
    **{kind: Checked(_LARGE, kind) for kind in _NUMBERS},
    **{kind: Checked(Double(), kind) for kind in _FLOATS},
    **{kind: Checked(String(), kind) for kind in (KvCache, Outcome, PlanKind)},
    **{kind: Checked(_RECORD, kind) for kind in _RECORDS},
}


def after_latest(name: str) -> Callable[[DefaultExecutionContext], datetime]:
    """Return what gives the current time, or a moment after all others in the column `name`.

    Rows keep their order when the clock is set back.
    """

    def stamp(context: DefaultExecutionContext) -> datetime:
        column = cast(Any, context.compiled).statement.table.c[name]
        # Of an empty table this is None, which the column itself does not take.
        greatest = type_coerce(func.max(column), DateTime())
        latest = context.root_connection.scalar(select(greatest))
        return now() if latest is None else max(now(), latest + timedelta(microseconds=1))

    return stamp


class Base(DeclarativeBase):
    """Base of every table of the project."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = _TYPES


class DeviceRow(Base):
    """A fingerprint that timings belong to."""

    __tablename__ = "device"
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[Device]
    created: Mapped[datetime] = mapped_column(default=now)


class RooflineRow(Base):
    """The `Roofline` of a device."""

    __tablename__ = "roofline"
    device_key: Mapped[str] = mapped_column(ForeignKey("device.key"), primary_key=True)
    bandwidth_bytes_per_s: Mapped[NonNegative]
    flops_per_s: Mapped[dict[str, NonNegative]]
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
    n: Mapped[Positive]
    k: Mapped[Positive]
    bias: Mapped[bool]
    dtype: Mapped[str]
    m: Mapped[Positive]
    format: Mapped[str]
    kernel: Mapped[str]
    working_set_bytes: Mapped[Count]
    outcome: Mapped[Outcome]
    reason: Mapped[str] = mapped_column(default="")
    latency_us: Mapped[NonNegative | None]
    samples_us: Mapped[tuple[NonNegative, ...]]
    relative_error: Mapped[float | None]
    created: Mapped[datetime] = mapped_column(default=now)


class ModelRow(Base):
    """A model by the hash of its content, and where it was last read from."""

    __tablename__ = "model"
    hash: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[ModelObject]
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
    loss: Mapped[Finite]
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
    identity: Mapped[Identity]
    workload: Mapped[Workload]
    limits: Mapped[LimitsObject]
    recording: Mapped[Recording | None]
    problem: Mapped[ProblemObject | None] = mapped_column(deferred=True)
    recommended: Mapped[str | None]
    complete: Mapped[bool] = mapped_column(default=False)
    spent_s: Mapped[NonNegative] = mapped_column(default=0.0)
    created: Mapped[datetime] = mapped_column(default=now)
    updated: Mapped[datetime] = mapped_column(
        default=after_latest("updated"), onupdate=after_latest("updated")
    )


class PlanRow(Base):
    """One plan of a study."""

    __tablename__ = "plan"
    id: Mapped[str] = mapped_column(primary_key=True)
    study_id: Mapped[str] = mapped_column(ForeignKey("study.id"), index=True)
    label: Mapped[str]
    kind: Mapped[PlanKind]
    model_hash: Mapped[str]
    dtype: Mapped[str]
    layers: Mapped[tuple[LayerChoice, ...]]
    prediction: Mapped[Prediction]
    kv_cache: Mapped[KvCache | None]
    created: Mapped[datetime] = mapped_column(default=after_latest("created"))


class ProofRow(Base):
    """The `Proof` of a plan, or the reason why it could not be proven."""

    __tablename__ = "proof"
    plan_id: Mapped[str] = mapped_column(ForeignKey("plan.id"), primary_key=True)
    outcome: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    proof: Mapped[Proof | None]
    created: Mapped[datetime] = mapped_column(default=now)


class DeliveryRow(Base):
    """The `Delivery` of a plan."""

    __tablename__ = "delivery"
    plan_id: Mapped[str] = mapped_column(ForeignKey("plan.id"), primary_key=True)
    delivery: Mapped[Delivery]
    created: Mapped[datetime] = mapped_column(default=after_latest("created"))


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
    samples_limit: Mapped[Count]
    lm_eval_version: Mapped[str]
    value: Mapped[float]
    stderr: Mapped[float | None]
    samples: Mapped[Count | None]
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


for _table in Base.metadata.tables.values():
    for _column in _table.columns:
        assert isinstance(_column.type, Checked)
        _column.type = _column.type.at(_column)
