"""Copying what was measured from one database into another.

What belongs to devices and models travels: timings, rooflines, losses, task scores of unquantized models. What belongs to a
study does not (plans, proofs, deliveries, references, task scores of plans): the same search makes it again, timing no kernel
twice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Select, UniqueConstraint, insert, select
from sqlalchemy.orm import Session

from autoquant.errors import StoreError
from autoquant.store.connect import open_read_only
from autoquant.store.repository import Store, transaction
from autoquant.store.schema import (
    Base,
    DeviceRow,
    LossRow,
    ModelRow,
    RooflineRow,
    TaskScoreRow,
    TimingRow,
)

_MERGED: dict[str, type[Base]] = {
    "devices": DeviceRow,
    "rooflines": RooflineRow,
    "timings": TimingRow,
    "models": ModelRow,
    "losses": LossRow,
    "task scores": TaskScoreRow,
}
"""In an order in which rows come after those that they refer to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedRows:
    """How many rows of a table were new, and how many were there already."""

    added: int
    known: int


def merge(store: Store, other: str | os.PathLike[str]) -> dict[str, MergedRows]:
    """Copy what was measured of devices and unquantized models in the database file `other` into `store`, in one transaction.

    Rows whose key is known stay as they are in `store`; `other` is only read.

    Raises:
        StoreError: `other` is the same file, or one that cannot be read as a database of this version.
    """
    own = store.engine.url.database
    if (
        own is not None
        and Path(own).exists()
        and Path(other).exists()
        and Path(own).samefile(other)
    ):
        raise StoreError(f"{other} is the database to merge into: name another one")
    source = open_read_only(other)
    try:
        with transaction(source.engine) as reading, transaction(store.engine) as writing:
            return {name: _copy(reading, writing, row) for name, row in _MERGED.items()}
    finally:
        source.close()


def _copy(reading: Session, writing: Session, row: type[Base]) -> MergedRows:
    key = _key(row)
    known = set(map(tuple, writing.execute(select(*(row.__table__.c[name] for name in key)))))
    facts = [dict(fact) for fact in reading.execute(_travelling(row)).mappings()]
    new = [fact for fact in facts if tuple(fact[name] for name in key) not in known]
    if new:
        writing.execute(insert(row), new)
    return MergedRows(added=len(new), known=len(facts) - len(new))


def _travelling(row: type[Base]) -> Select[Any]:
    """The rows that are copied, without the numbers that only their own database knows them by."""
    columns = select(*(column for column in row.__table__.columns if column.name != "id"))
    return (
        columns.where(TaskScoreRow.subject.in_(select(ModelRow.hash)))
        if row is TaskScoreRow
        else columns
    )


def _key(row: type[Base]) -> list[str]:
    """The columns that make a row unique: its unique constraint, or its primary key where it has none."""
    table = Base.metadata.tables[row.__tablename__]
    unique = next(
        (each for each in table.constraints if isinstance(each, UniqueConstraint)),
        table.primary_key,
    )
    return [column.name for column in unique.columns]
