"""The write-ahead log of a SQLite file: the first write begins it, once all values are valid."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, undefer

from autoquant.store.refused import BUSY_TIMEOUT_S
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
        with closing(engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
            write_to_log(cursor)


def write_to_log(cursor: Any) -> None:
    """Switch a SQLite file to a log, through the cursor of a connection.

    Raises:
        sqlite3.OperationalError: Others have used the file for `BUSY_TIMEOUT_S`, or it cannot be
            written.
    """
    ends_s = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # SQLite waits for others in every statement but this one.
            busy = getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY")
            if not busy or time.monotonic() > ends_s:
                raise
            time.sleep(0.01)


def _journal(engine: Engine) -> str:
    with closing(engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
        cursor.execute("PRAGMA journal_mode")
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
