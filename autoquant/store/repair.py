"""Save what is whole of a damaged database: its valid rows, in a new one."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Table, UniqueConstraint, insert
from sqlalchemy.dialects.sqlite import dialect
from sqlalchemy.orm import Session

from autoquant.errors import StoreError
from autoquant.hints import did_you_mean_path
from autoquant.records import Workload
from autoquant.store.addresses import shown_address
from autoquant.store.columns import BadValueError
from autoquant.store.connect import connect_read_only, open_store
from autoquant.store.rows import check_in_study, check_row
from autoquant.store.schema import Base, StudyRow
from autoquant.store.transactions import transaction

_LAST_ROW = 2**62
_DEEPEST = 12  # halvings of a range of rows around pages that cannot be read
_MANY_ROWS = 2**24
_BATCH_ROWS = 500
_HEADER_BYTES = 100


@dataclass(slots=True, kw_only=True)
class SavedRows:
    """What came of the rows of a table.

    Attributes:
        lost: Rows that were read, and are not valid or refer to a row that is not there.
        emptied: Values that were left out of saved rows, where a column may be empty.
        reason: What the first value that was lost or left out is, and should be.
        unreadable: Whether some of the table's pages could not be read.
        missing: Whether the file has no such table.
    """

    saved: int = 0
    lost: int = 0
    emptied: int = 0
    reason: str = ""
    unreadable: bool = False
    missing: bool = False

    @property
    def whole(self) -> bool:
        """Whether nothing was lost, as far as the file shows it."""
        return not (self.lost or self.emptied or self.unreadable or self.missing)


def repair(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, SavedRows]:
    """Copy the valid rows of a SQLite file, whose referents are there, into a new database.

    The file is only read. `out` appears when it is complete.

    Raises:
        StoreError: `out` exists or cannot be made, or nothing can be read.
    """
    if "://" in str(path):
        raise StoreError(
            f"{shown_address(str(path))} is no file: restore a server's database from a backup"
        )
    source, target = Path(path), Path(out)
    if target.exists():
        raise StoreError(f"{target} exists already: give the name of a new file with --out")
    if not target.parent.is_dir():
        raise StoreError(f"the folder {target.parent} does not exist: make it first")
    _check_is_file(source)
    try:
        with tempfile.TemporaryDirectory(prefix=".repair-", dir=target.parent) as scratch:
            new = Path(scratch) / "new.db"
            open_store(new).close()
            with closing(_opened(source, new)) as reading:
                saved = _save(reading, new)
            if not any(rows.saved for rows in saved.values()):
                raise StoreError(
                    f"{source} is no database of autoquant, or no row of it can be saved: restore"
                    " it from a copy, or search again"
                )
            target.touch(exist_ok=False)
            os.replace(new, target)
    except sqlite3.DatabaseError as error:
        raise StoreError(f"no row of {source} can be saved: {error}") from error
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
    return saved


def _check_is_file(path: Path) -> None:
    """Refuse a file that cannot be read at all."""
    try:
        if path.exists() and not path.is_file():
            raise StoreError(f"{path} is no regular file: give the database itself")
        path.open("rb").close()
    except OSError as error:
        raise StoreError(
            f"cannot read {path}: {error.strerror}{did_you_mean_path(path)}"
        ) from error


def _opened(source: Path, new: Path) -> sqlite3.Connection:
    """Open a damaged file, or else a copy of it that has the header of a new database."""
    for path in (source, new.with_name("headed.db")):
        if path != source:
            _copy_with_header(source, path, new)
        reading = connect_read_only(path)
        reading.text_factory = _text
        # Nothing is written. But so SQLite reads what is there of a file that was cut, and knows
        # those tables whose names can be read, once it has failed to read all names.
        reading.execute("PRAGMA writable_schema = ON")
        try:
            reading.execute("PRAGMA schema_version").fetchone()
        except sqlite3.DatabaseError as error:
            refused = error
            reading.close()
            continue
        with suppress(sqlite3.DatabaseError):
            reading.execute("SELECT 1 FROM sqlite_master").fetchone()
        return reading
    raise refused


def _copy_with_header(source: Path, copy: Path, new: Path) -> None:
    """Copy a file and its log. The copy begins as `new` does, and has all of its own pages."""
    shutil.copyfile(source, copy)
    if Path(f"{source}-wal").exists():
        shutil.copyfile(f"{source}-wal", f"{copy}-wal")
    with new.open("rb") as file:
        header = bytearray(file.read(_HEADER_BYTES))
    page_bytes = int.from_bytes(header[16:18], "big")
    header[28:32] = (copy.stat().st_size // page_bytes).to_bytes(4, "big")
    header[32:40] = bytes(8)  # no free pages
    header[92:96] = header[24:28]  # or SQLite would not believe how many pages there are
    with copy.open("r+b") as file:
        file.write(header)


def _save(reading: sqlite3.Connection, new: Path) -> dict[str, SavedRows]:
    store = open_store(new)
    try:
        with transaction(store.engine, writes=True) as writing:
            copy = _Copy(reading, writing)
            for mapper in sorted(Base.registry.mappers, key=lambda each: _order(each.class_)):
                copy.table(mapper.class_)
        return copy.saved
    finally:
        store.close()


def _order(row: type[Base]) -> int:
    """Return the place of a table behind those that it refers to."""
    return Base.metadata.sorted_tables.index(Base.metadata.tables[row.__tablename__])


def _text(data: bytes) -> str | bytes:
    """Return bytes as text if they are text. If not, the column refuses them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


@dataclass
class _Copy:
    """Copies rows from table to table, those first that others refer to."""

    reading: sqlite3.Connection
    writing: Session
    saved: dict[str, SavedRows] = field(default_factory=dict)
    _keys: dict[str, set[Any]] = field(default_factory=dict)  # of saved rows, by TABLE.COLUMN
    _workloads: dict[str, Workload] = field(default_factory=dict)  # of saved studies, by id

    def table(self, row: type[Base]) -> None:
        """Copy the valid rows of one table."""
        table = Base.metadata.tables[row.__tablename__]
        rows = self.saved[table.name] = SavedRows()
        names = [column.name for column in table.columns]
        readers = [column.type.result_processor(dialect(), None) for column in table.columns]
        known: set[tuple[Any, ...]] = set()
        batch: list[dict[str, Any]] = []
        for values in _readable(self.reading, table.name, names, rows):
            try:
                checked = _checked(table, readers, values, rows)
                self._check(row(**checked), known)
            except BadValueError as error:
                rows.lost += 1
                rows.reason = rows.reason or str(error)
                continue
            batch.append(checked)
            rows.saved += 1
            if len(batch) == _BATCH_ROWS:
                self.writing.execute(insert(table), batch)
                batch.clear()
        if batch:
            self.writing.execute(insert(table), batch)

    def _check(self, row: Any, known: set[tuple[Any, ...]]) -> None:
        """Check a row with those already saved."""
        check_row(row)
        table = Base.metadata.tables[row.__tablename__]
        for column in table.columns:
            for key in column.foreign_keys:
                if getattr(row, column.name) not in self._keys.get(key.target_fullname, ()):
                    parent = key.column.table.name
                    raise BadValueError(f"its {parent} is not there")
        check_in_study(row, self._workloads)
        unique = [each for each in table.constraints if isinstance(each, UniqueConstraint)]
        for constraint in (table.primary_key, *unique):
            key_of_row = (
                constraint.name,
                *(getattr(row, column.name) for column in constraint.columns),
            )
            if key_of_row in known:
                raise BadValueError("it is there twice")
            known.add(key_of_row)
        for column in table.primary_key:
            keys = self._keys.setdefault(f"{table.name}.{column.name}", set())
            keys.add(getattr(row, column.name))
        if isinstance(row, StudyRow):
            self._workloads[row.id] = row.workload


def _checked(
    table: Table, readers: Sequence[Any], values: Sequence[Any], rows: SavedRows
) -> dict[str, Any]:
    """Return the values of a row as Python has them. A bad one that may be empty is emptied."""
    found = {}
    for column, read, value in zip(table.columns, readers, values, strict=True):
        try:
            found[column.name] = read(value)
        except BadValueError as error:
            if not column.nullable:
                raise
            found[column.name] = None
            rows.emptied += 1
            rows.reason = rows.reason or str(error)
    return found


def _readable(
    reading: sqlite3.Connection, table: str, names: list[str], rows: SavedRows
) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table that can be read; none if it is not there."""
    try:
        columns = {row[1] for row in reading.execute(f'PRAGMA table_info("{table}")')}
    except sqlite3.DatabaseError:
        rows.unreadable = True
        return
    rows.missing = not columns
    if columns:
        selected = ", ".join(f'"{name}"' if name in columns else "NULL" for name in names)
        query = f'SELECT rowid, {selected} FROM "{table}" WHERE rowid BETWEEN ? AND ?'
        for found in _around_damage(reading, query, (-_LAST_ROW, _LAST_ROW), rows, _DEEPEST):
            yield found[1:]


def _around_damage(
    reading: sqlite3.Connection,
    query: str,
    between: tuple[int, int],
    rows: SavedRows,
    depth: int,
) -> Iterator[tuple[Any, ...]]:
    """Yield rows from both ends of a range, then from the halves of what is left between."""
    low, high = between
    try:
        for found in reading.execute(f"{query} ORDER BY rowid", (low, high)):
            yield found
            low = found[0] + 1
        return
    except sqlite3.DatabaseError:
        rows.unreadable = True
    try:
        for found in reading.execute(f"{query} ORDER BY rowid DESC", (low, high)):
            yield found
            high = found[0] - 1
    except sqlite3.DatabaseError:
        pass
    low, high = max(low, 0), min(high, max(low, 0) + _MANY_ROWS)
    if depth and low < high:
        middle = (low + high) // 2
        yield from _around_damage(reading, query, (low, middle), rows, depth - 1)
        yield from _around_damage(reading, query, (middle + 1, high), rows, depth - 1)
