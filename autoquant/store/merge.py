"""Copy measurements from one database into another.

What belongs to devices and models is copied: timings, rooflines, losses, and task scores of
unquantized models. What belongs to a study is not: plans, proofs, deliveries, references, and task
scores of plans. The same search makes it again, and times no kernel twice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Select, UniqueConstraint, insert, select
from sqlalchemy.orm import Session

from autoquant.errors import StoreError
from autoquant.store.addresses import shown_address
from autoquant.store.connect import open_read_only
from autoquant.store.repository import Store
from autoquant.store.schema import (
    Base,
    DeviceRow,
    LossRow,
    ModelRow,
    RooflineRow,
    TaskScoreRow,
    TimingRow,
)
from autoquant.store.transactions import transaction

_MERGED: dict[str, type[Base]] = {
    "devices": DeviceRow,
    "rooflines": RooflineRow,
    "timings": TimingRow,
    "models": ModelRow,
    "losses": LossRow,
    "task scores": TaskScoreRow,
}
"""Ordered so that rows follow the rows that they refer to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedRows:
    """How many rows of a table were new, and how many were known."""

    added: int
    known: int


def merge(store: Store, other: str | os.PathLike[str]) -> dict[str, MergedRows]:
    """Copy measurements of devices and unquantized models from the database `other` into `store`.

    One transaction copies all of them. Rows whose key is known keep their values in `store`.
    `other` is only read.

    Raises:
        StoreError: `other` is the same database, or no database of this version.
    """
    url = store.engine.url
    own = url.database if url.get_backend_name() == "sqlite" else None
    source = open_read_only(other)
    try:
        if source.engine.url == url or _is_same_file(own, Path(other)):
            shown = shown_address(str(other))
            raise StoreError(f"{shown} is the database to merge into: name another one")
        with (
            transaction(source.engine) as reading,
            transaction(store.engine, writes=True) as writing,
        ):
            return {name: _copy(reading, writing, row) for name, row in _MERGED.items()}
    finally:
        source.close()


def _is_same_file(own: str | None, other: Path) -> bool:
    if own is None or not Path(own).exists() or not other.exists():
        return False
    return Path(own).samefile(other)


def _copy(reading: Session, writing: Session, row: type[Base]) -> MergedRows:
    key = _key(row)
    columns = [row.__table__.c[name] for name in key]
    known = {tuple(found) for found in writing.execute(select(*columns))}
    facts = [dict(fact) for fact in reading.execute(_travelling(row)).mappings()]
    new = [fact for fact in facts if tuple(fact[name] for name in key) not in known]
    if new:
        writing.execute(insert(row), new)
    return MergedRows(added=len(new), known=len(facts) - len(new))


def _travelling(row: type[Base]) -> Select[Any]:
    """Return the query for the rows to copy, without the ids of their database."""
    query = select(*(column for column in row.__table__.columns if column.name != "id"))
    if row is TaskScoreRow:
        # Scores of plans belong to a study.
        return query.where(TaskScoreRow.subject.in_(select(ModelRow.hash)))
    return query


def _key(row: type[Base]) -> list[str]:
    """Return the columns of the unique constraint, or else of the primary key."""
    table = Base.metadata.tables[row.__tablename__]
    unique = next(
        (each for each in table.constraints if isinstance(each, UniqueConstraint)),
        table.primary_key,
    )
    return [column.name for column in unique.columns]
