"""Transactions: all that is read or written in one go, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from autoquant.errors import StoreError
from autoquant.store import postgres
from autoquant.store.addresses import shown_address
from autoquant.store.columns import BadValueError
from autoquant.store.integrity import damaged, is_damage
from autoquant.store.log import check_and_begin_log
from autoquant.store.refused import READ_ONLY, refusal


@contextmanager
def transaction(engine: Engine, *, writes: bool = False) -> Iterator[Session]:
    """Open a session that is committed at the end, or rolled back if something raises.

    Args:
        writes: Wait at the beginning until no other process writes. SQLite refuses to write after
            reading in one transaction if another process wrote in between.

    Raises:
        StoreError: The database refused a statement, or a row that was read is damaged.
    """
    try:
        if writes:
            if engine.get_execution_options().get("read_only"):
                raise StoreError(READ_ONLY.format(name_of(engine)))
            check_and_begin_log(engine)
        options: dict[str, Any] = {"writes": writes}
        if engine.dialect.name == postgres.BACKEND:
            options |= postgres.isolation(writes=writes)
        with Session(engine.execution_options(**options)) as session, session.begin():
            yield session
    except BadValueError as error:
        raise damaged(name_of(engine), str(error)) from error
    except DatabaseError as error:
        if is_damage(error):
            raise damaged(name_of(engine), str(error.orig)) from error
        raise StoreError(refusal(error, name_of(engine))) from error


def name_of(engine: Engine) -> str:
    """Return the file of a database, or the URL of another one without its password."""
    url = engine.url
    if url.get_backend_name() == "sqlite":
        return url.database or "the database"
    return shown_address(url.render_as_string(hide_password=False))


class Transactions:
    """The transactions of one database.

    Args:
        engine: From `autoquant.store.open_store`, which checks and migrates the schema.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def _session(self) -> AbstractContextManager[Session]:
        return transaction(self.engine)

    def _writing(self) -> AbstractContextManager[Session]:
        return transaction(self.engine, writes=True)
