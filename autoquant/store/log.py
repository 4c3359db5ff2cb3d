"""The write-ahead log of a SQLite file: the first write begins it, once all values are valid."""

from __future__ import annotations

from contextlib import closing
from weakref import WeakSet

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, undefer

from autoquant.store.rows import check_in_study
from autoquant.store.schema import Base, StudyRow

_begun: WeakSet[Engine] = WeakSet()
"""Engines that have written: SQLite keeps a log to the end once it is there."""


def check_and_begin_log(engine: Engine) -> None:
    """Before an engine's first write, begin the log of a file that has none.

    Raises:
        BadValueError: A row is not valid. No byte of the file has changed.
    """
    if engine in _begun:
        return
    # The file changes when its log begins, so its rows are checked before.
    if engine.dialect.name == "sqlite" and _journal(engine) not in ("wal", "memory"):
        _check_values(engine)
        begin_log(engine)
    _begun.add(engine)


def begin_log(engine: Engine) -> None:
    """Have SQLite write to a log beside the file from now on, which others may read meanwhile."""
    if engine.dialect.name == "sqlite":
        _journal(engine, " = WAL")


def _journal(engine: Engine, setting: str = "") -> str:
    with closing(engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
        cursor.execute(f"PRAGMA journal_mode{setting}")
        (journal,) = cursor.fetchone() or ("",)
        return str(journal)


def _check_values(engine: Engine) -> None:
    """Read every row. Each is checked as it is loaded, and then against its study."""
    with Session(engine) as session:
        studies = select(StudyRow.id, StudyRow.workload)
        workloads = {study_id: workload for study_id, workload in session.execute(studies)}
        for mapper in Base.registry.mappers:
            query = select(mapper.class_).options(undefer("*")).execution_options(yield_per=500)
            for row in session.scalars(query):
                check_in_study(row, workloads)
