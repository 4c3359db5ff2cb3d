"""What differs on a PostgreSQL server: transactions, and why it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

BACKEND = "postgresql"
DRIVER = "psycopg"
EXTRA = "autoquant[postgres]"
_WRITERS = 0x41514E54
"""Number of the lock that writing transactions hold: "AQNT"."""
_MAKERS = _WRITERS + 1
"""Number of the lock of those that make the tables of a library."""
_FOREIGN_KEY = "23503"
_LOCK_TIMEOUT = "55P03"
_DENIED = "42501"
_FULL = ("53100", "53200")
_CONNECTION = ("08", "57P")
"""Beginnings of the codes of a server that is not there, or ends."""


def isolation(*, writes: bool) -> dict[str, Any]:
    """Return the options of a transaction.

    One that reads sees the database of one moment. One that writes sees what those that wrote
    before it have committed, for which it has waited.
    """
    return {"isolation_level": "READ COMMITTED" if writes else "REPEATABLE READ"}


def begin(connection: Connection, *, timeout_s: float) -> None:
    """Begin a transaction; one that writes waits until no other does, as on SQLite.

    Args:
        timeout_s: How long it waits.
    """
    if connection.get_execution_options().get("writes", False):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(1000 * timeout_s)}")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS})")


@contextmanager
def one_at_a_time(url: str) -> Iterator[None]:
    """Inside, no other process or thread is inside with the same database."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MAKERS})")
        yield


def kind_of(error: DatabaseError) -> str:
    """Return why a statement failed, or "" for a reason without a word.

    The words are `busy`, `denied`, `full`, `orphan` and `gone`.
    """
    code = getattr(error.orig, "sqlstate", None)
    if code is None:
        # The driver gives no code where there was no connection.
        return "gone" if type(error.orig).__name__ == "OperationalError" else ""
    kinds = {_FOREIGN_KEY: "orphan", _LOCK_TIMEOUT: "busy", _DENIED: "denied"}
    kinds |= dict.fromkeys(_FULL, "full")
    return kinds.get(code, "gone" if code.startswith(_CONNECTION) else "")
