"""Open a database: check that it is ours, and migrate it to the newest schema."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError
from sqlalchemy.pool import NullPool

from autoquant.errors import StoreError, first_line
from autoquant.files import is_writable
from autoquant.hints import did_you_mean_path
from autoquant.store import postgres
from autoquant.store.addresses import shown_address, why_unclear
from autoquant.store.integrity import check_integrity, damaged
from autoquant.store.log import begin_log, write_to_log
from autoquant.store.refused import BUSY_TIMEOUT_S, READ_ONLY, refusal
from autoquant.store.repository import Store
from autoquant.store.schema import Base

if TYPE_CHECKING:
    from alembic.config import Config

_log = logging.getLogger(__name__)

APPLICATION_ID = 0x41514E54  # "AQNT" in the SQLite header marks our files
VERSION_TABLE = "autoquant_schema"
_RIGHT_URL = (
    "give the path of a file, or the URL of a database, e.g. postgresql://USER@HOST/DATABASE"
)
_MEMORY = ":memory:"  # also the meaning of a SQLite URL that names no file


def open_store(address: str | os.PathLike[str], *, create: bool = True) -> Store:
    """Open the store at a path (SQLite) or an SQLAlchemy URL.

    Args:
        create: Make a missing database. With False, a missing file stays missing, and a database of
            a server stays without our tables.

    Raises:
        StoreError: The file is missing, not writable, damaged, of another program, or of a newer
            autoquant. The URL is none of a database, or its driver is not installed.
    """
    check_address(address, create=create)
    _check_damage(str(address))
    engine = _engine(str(address))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    elif engine.dialect.name == postgres.BACKEND:
        event.listen(engine, "begin", partial(postgres.begin, timeout_s=BUSY_TIMEOUT_S))
    try:
        if not create:
            _check_exists(engine, str(address))
        _migrate(engine, str(address))
        _check_tables(engine, str(address))
    except DatabaseError as error:
        engine.dispose()
        raise StoreError(refusal(error, shown_address(str(address)))) from error
    except StoreError:
        engine.dispose()
        raise
    _log.info("opened the database %s", shown_address(str(address)))
    return Store(engine)


def open_existing(address: str | os.PathLike[str]) -> Store:
    """Open an existing database, for reading alone if its file may not be written.

    Raises what `open_store` and `open_read_only` raise.
    """
    file = _file_of(str(address))
    if file is not None and file.is_file() and not _may_write(file):
        return open_read_only(file)
    return open_store(address, create=False)


def open_read_only(path: str | os.PathLike[str]) -> Store:
    """Open a database of today's schema, and change no byte of it.

    Args:
        path: Of a file, or the URL of a database.

    Raises:
        StoreError: The file is missing, damaged, of another program, or of an older or newer
            autoquant.
    """
    address = str(path)
    file = _file_of(address)
    engine = _engine(address) if file is None else _engine_of_read_only(file)
    try:
        _check_revision(engine, shown_address(address))
        _check_tables(engine, address)
    except DatabaseError as error:
        raise StoreError(refusal(error, shown_address(address))) from error
    return Store(engine)


def _engine_of_read_only(file: Path) -> Engine:
    """Return the engine of a file that was checked."""
    _check_file(file, create=False, write=False)
    with closing(connect_read_only(file)) as connection:
        check_integrity(connection, file)
    engine = create_engine(
        URL.create("sqlite", database=str(file)),
        creator=lambda: connect_read_only(file),
        poolclass=NullPool,
    )
    engine.update_execution_options(read_only=True)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def connect_read_only(file: Path) -> sqlite3.Connection:
    """Open a SQLite file so that no byte of it changes, and no file appears beside it."""
    # A file without a log beside it is open nowhere else. Then `immutable` is safe, and it alone
    # keeps SQLite from leaving a log there.
    mode = "mode=ro" if Path(f"{file}-wal").exists() else "mode=ro&immutable=1"
    uri = f"{file.absolute().as_uri()}?{mode}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)


def check_address(address: str | os.PathLike[str], *, create: bool = True) -> None:
    """Refuse a file that `open_store` would refuse, without touching it.

    Raises:
        StoreError: As for `open_store`, except for what only the schema shows.
    """
    file = _file_of(str(address))
    if file is not None:
        _check_file(file, create=create)


def _engine(address: str) -> Engine:
    """Return the engine of an address, which is not connected yet."""
    if reason := why_unclear(address):
        raise StoreError(f"the address of the database {reason}: {_RIGHT_URL}")
    try:
        url = make_url(address) if "://" in address else URL.create("sqlite", database=address)
        if url.drivername in ("postgresql", "postgres"):
            url = url.set(drivername=f"{postgres.BACKEND}+{postgres.DRIVER}")
        if url.get_backend_name() == "sqlite":
            return create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
        return create_engine(url, pool_pre_ping=True)  # the server may have been restarted
    except ValueError as error:  # it would show what may be a password where the port is expected
        raise StoreError(f"the port of the database's URL is no number: {_RIGHT_URL}") from error
    except (ArgumentError, ImportError) as error:
        shown = re.sub("://.*@", "://***@", shown_address(address))
        raise StoreError(
            f"{shown} is no database that can be opened"
            f" ({first_line(error)}): give the path of a file, or the URL of a database whose"
            f" driver is installed, as `pip install {postgres.EXTRA}` does"
        ) from error


def _file_of(address: str) -> Path | None:
    """Return the SQLite file of an address, or None for another database."""
    if "://" not in address and not why_unclear(address):
        return Path(address)
    url = _engine(address).url
    return Path(url.database or _MEMORY) if url.get_backend_name() == "sqlite" else None


def _check_damage(address: str) -> None:
    """Refuse a damaged file before anything opens it to write: a log, a migration, a row."""
    file = _file_of(address)
    if file is None or not file.exists() or not file.stat().st_size:
        return
    try:
        with closing(connect_read_only(file)) as connection:
            check_integrity(connection, file)
    except StoreError:
        # Another process may have begun to write while the file was read. Damage stays.
        with closing(connect_read_only(file)) as connection:
            check_integrity(connection, file)


def _check_exists(engine: Engine, address: str) -> None:
    """Refuse a database of a server in which no store was made yet."""
    current, tables = _found(engine)
    if engine.dialect.name == "sqlite" or current or tables & set(Base.metadata.tables):
        return
    shown = shown_address(address)
    raise StoreError(f"no store in {shown} yet; `autoquant search ... --db {shown}` makes one")


def _check_tables(engine: Engine, address: str) -> None:
    """Refuse a database that lacks a table or a column of its schema."""
    found = inspect(engine)
    names = set(found.get_table_names())
    for table in Base.metadata.sorted_tables:
        columns = found.get_columns(table.name) if table.name in names else []
        wanted = {column.name for column in table.columns}
        if missing := wanted - {column["name"] for column in columns}:
            raise damaged(
                shown_address(address), f"its table {table.name} lacks {', '.join(sorted(missing))}"
            )


def folder_of(address: str) -> Path:
    """Return the folder of a SQLite file, or the current folder for another database."""
    file = _file_of(address)
    return Path() if file is None else file.parent


def _check_file(path: Path, *, create: bool, write: bool = True) -> None:
    """Refuse what SQLite would notice only after writing. This opens the file read-only."""
    if str(path) == _MEMORY:
        raise StoreError(
            f"SQLite forgets {_MEMORY} when a command ends: give the path of a database file, e.g."
            " plan.db"
        )
    if path.is_dir():
        raise StoreError(
            f"{path} is a folder; give the path of a database file, e.g. {path / 'plan.db'}"
        )
    if path.exists() and not path.is_file():
        raise StoreError(f"{path} is no regular file: give the path of a database file")
    if not path.exists() or path.stat().st_size == 0:
        if not create and path.exists():
            raise StoreError(f"{path} is empty: restore it from a copy, or search again")
        if not create:
            raise StoreError(
                f"no database at {path}{did_you_mean_path(path)}; `autoquant search ... --db"
                f" {path}` makes one"
            )
        folder = path.parent
        if not folder.is_dir():
            raise StoreError(f"the folder {folder} does not exist; make it first")
        if not is_writable(folder):
            raise StoreError(f"cannot write into {folder}; choose another place with --db")
        return
    if write and not _may_write(path):
        raise StoreError(READ_ONLY.format(path))
    _check_header(path)


def _may_write(path: Path) -> bool:
    return is_writable(path) and is_writable(path.parent)


def _check_header(path: Path) -> None:
    """Refuse what is no database of ours, or shorter than it says.

    SQLite reads the header. If this process closed the file by itself, it would lose the locks of
    its other connections, and another process would delete their log with all that they write.
    """
    being_written = Path(f"{path}-wal").exists()  # then the file may be shorter for a while
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname == "SQLITE_CORRUPT":
            if being_written:
                return
            raise damaged(path, "it is truncated") from error
        raise StoreError(
            f"{path} is not an autoquant database (no SQLite file); give another file for the"
            " database"
        ) from error
    if application != APPLICATION_ID:
        raise StoreError(f"{path} belongs to another program; give another file for the database")


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # `_begin_sqlite` begins transactions, so that they cover changes of tables too.
    connection.isolation_level = None
    cursor = connection.cursor()
    is_new = cursor.execute("PRAGMA page_count").fetchone()[0] == 0
    if is_new:
        # Before the log exists, so that the mark is in the file itself.
        cursor.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        write_to_log(cursor)
    # A fact is shown once it is kept, so it must outlive a loss of power from then on.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA fullfsync = ON")  # macOS: through the cache of the disk, too
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA trusted_schema = OFF")  # views and triggers of others call no functions
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: Engine, address: str) -> None:
    """Migrate the schema to the newest revision, each step in one transaction."""
    from alembic import command

    if _is_newest(engine, address):
        return
    config = _migrations()
    _log.info("bringing the schema of %s up to date", shown_address(address))
    begin_log(engine)
    with engine.execution_options(writes=True).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")  # nothing is left to do if another process was first


def _check_revision(engine: Engine, address: str) -> None:
    """Refuse a schema that would have to be migrated before it can be read."""
    if not _is_newest(engine, address):
        raise StoreError(
            f"{address} was written by an older autoquant; `autoquant studies {address}` brings it"
            " up to date"
        )


def _migrations() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _is_newest(engine: Engine, address: str) -> bool:
    """Return whether the schema is the newest, and refuse one that is newer than that."""
    newest, known = _revisions()
    current, tables = _found(engine)
    theirs = sorted(tables & set(Base.metadata.tables)) if current is None else []
    if theirs and engine.dialect.name == postgres.BACKEND:
        raise StoreError(
            f"{shown_address(address)} has tables of another program that are named as ours"
            f" ({', '.join(theirs)}): give a database of its own"
        )
    if theirs:
        raise damaged(
            shown_address(address), f"{VERSION_TABLE} does not say which schema its tables have"
        )
    if current is not None and current not in known:
        raise StoreError(
            f"{shown_address(address)} was written by a newer autoquant (schema {current}); "
            "upgrade autoquant to read it, or give another file for the database"
        )
    return current == newest


@cache
def _revisions() -> tuple[str | None, frozenset[str]]:
    """Return the newest revision of the schema, and all of them."""
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(_migrations())
    known = frozenset(revision.revision for revision in script.walk_revisions())
    return script.get_current_head(), known


def _found(engine: Engine) -> tuple[str | None, set[str]]:
    """Return the schema's revision and the tables, both of one moment: another may migrate now."""
    with engine.begin() as connection:
        tables = set(inspect(connection).get_table_names())
        if VERSION_TABLE not in tables:
            return None, tables
        query = text(f"SELECT version_num FROM {VERSION_TABLE}")
        return connection.execute(query).scalar(), tables
