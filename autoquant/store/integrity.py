"""Find damage of a SQLite file before anything is written to it."""

from __future__ import annotations

import os
import sqlite3

from sqlalchemy.exc import DatabaseError

from autoquant.errors import StoreError

_DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def check_integrity(connection: sqlite3.Connection, path: os.PathLike[str]) -> None:
    """Run SQLite's own checks, of pages, indexes, and rows that refer to others.

    Raises:
        StoreError: The file is damaged. Nothing was written to it.
    """
    try:
        finding = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
        orphan = connection.execute("PRAGMA foreign_key_check").fetchone()
    except UnicodeDecodeError as error:  # SQLite names what is damaged, and the name is, too
        raise damaged(path, "its schema holds bytes that are no text") from error
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and not _is_damage(error):
            raise StoreError(f"cannot read {path}: {error}") from error
        raise damaged(path, str(error)) from error
    if finding != "ok":
        raise damaged(path, finding.removeprefix("*** in database main ***").strip())
    if orphan is not None:
        table, row, parent, _ = orphan
        raise damaged(path, f"row {row} of {table} refers to a {parent} that is not there")


def damaged(path: str | os.PathLike[str] | None, reason: str) -> StoreError:
    """Make the error for a damaged database."""
    what = f"{path} is damaged ({reason}): restore it from a"
    if "://" in str(path):
        return StoreError(f"{what} backup of the server")
    return StoreError(
        f"{what} copy, or save what is whole with `autoquant repair {path} --out NEW.db`"
    )


def is_damage(error: DatabaseError) -> bool:
    """Check whether SQLite could not read its file, as opposed to refusing a statement."""
    return isinstance(error.orig, sqlite3.Error) and _is_damage(error.orig)


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    undecodable = str(error).startswith("Could not decode")  # by Python, hence without a code
    return undecodable or (code is not None and code & 0xFF in _DAMAGE_CODES)
