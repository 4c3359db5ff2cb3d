"""Say in one line why a database refused, and what to do."""

from __future__ import annotations

from sqlalchemy.exc import DatabaseError

BUSY_TIMEOUT_S = 60
"""So long a process waits for others to have written."""

_FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")


def refusal(error: DatabaseError, place: str | None) -> str:
    """Return why a statement failed, in one line.

    Args:
        place: Path or name of the database.
    """
    place = place or "the database"
    name = getattr(error.orig, "sqlite_errorname", "")
    if name in _FULL:
        return f"the disk is full: no room for {place}; free some, and the same command goes on"
    if name.startswith("SQLITE_BUSY"):
        return (
            f"another program has kept {place} locked for {BUSY_TIMEOUT_S} s; when it is done, the"
            " same command goes on"
        )
    if name == "SQLITE_CONSTRAINT_FOREIGNKEY":
        return (
            f"{place} lacks what this belongs to ({error.orig}): perhaps its study was removed"
            " meanwhile; the same command begins it again, and times nothing twice"
        )
    return f"cannot use {place} as a database: {error.orig}"
