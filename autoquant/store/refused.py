"""Say in one line why a database refused, and what to do."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DatabaseError

from autoquant.errors import first_line
from autoquant.store import postgres

BUSY_TIMEOUT_S = 60
"""So long a process waits for others to have written."""

READ_ONLY = "cannot write to {} (read-only); copy it somewhere writable"
_FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")


def refusal(error: DatabaseError, place: str | None) -> str:
    """Return why a statement failed, in one line.

    Args:
        place: Path or name of the database, without a password.
    """
    place = place or "the database"
    reason = first_line(error.orig) if error.orig else "no reason given"
    messages = {
        "full": f"the disk is full: no room for {place}; free some, and the same command goes on",
        "busy": (
            f"another program has kept {place} locked for {BUSY_TIMEOUT_S} s; when it is done, the"
            " same command goes on"
        ),
        "orphan": (
            f"{place} lacks what this belongs to ({reason}): perhaps its study was removed"
            " meanwhile; the same command begins it again, and times nothing twice"
        ),
        "denied": (
            f"{place} does not allow this ({reason}): have its owner grant it to the user, or give"
            " another database"
        ),
        "gone": (
            f"cannot reach {place} ({reason}): check the address and that the server runs; then"
            " the same command goes on"
        ),
    }
    return messages.get(_kind(error), f"cannot use {place} as a database: {reason}")


def _kind(error: DatabaseError) -> str:
    """Return the key of a message, or an empty string."""
    if not isinstance(error.orig, sqlite3.Error):
        return postgres.kind_of(error)
    name = getattr(error.orig, "sqlite_errorname", "")
    if name in _FULL:
        return "full"
    if name.startswith("SQLITE_BUSY"):
        return "busy"
    return "orphan" if name == "SQLITE_CONSTRAINT_FOREIGNKEY" else ""
