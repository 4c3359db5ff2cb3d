"""One transaction: all of it is kept, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from autoquant.errors import StoreError


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """A session that is committed at the end, and rolled back where something is raised.

    Raises:
        StoreError: The database refused what was asked of it.
    """
    try:
        with Session(engine) as session, session.begin():
            yield session
    except DatabaseError as error:
        raise StoreError(f"the database refused: {error.orig}") from error
