"""Column types that check what they read: the one place where values of rows enter.

SQLite keeps any value in any column, and a file may be damaged. So each column says what it holds,
and each value is held to it. JSON columns hold records, see `autoquant.records`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Dialect, String
from sqlalchemy.types import TypeDecorator, TypeEngine

from autoquant.errors import StoreError, first_line
from autoquant.typed import check, read


class BadValueError(StoreError):
    """A row holds what its column does not take, or rows contradict one another."""


def plain(record: Any) -> Any:
    """Return a record as dicts and lists that JSON can hold."""
    return json.loads(to_json(record))


def to_json(record: Any) -> str:
    """Return a record, or a list of records, as JSON."""
    return json.dumps(record, separators=(",", ":"), default=_as_dict)


def _as_dict(record: Any) -> dict[str, Any]:
    if is_dataclass(record) and not isinstance(record, type):
        return asdict(record)
    raise TypeError(f"{type(record).__name__} is no record")


class Checked(TypeDecorator[Any]):
    """A column whose values are of a kind.

    Args:
        impl: SQLAlchemy's type of the column.
        kind: What its values are, e.g. `Annotated[int, Ge(1)]`, or the records in its JSON.
        place: `TABLE.COLUMN`, for messages.
        optional: Whether the column may be empty.
    """

    impl = String
    cache_ok = True

    def __init__(
        self, impl: TypeEngine[Any], kind: Any, place: str = "", *, optional: bool = False
    ) -> None:
        super().__init__()
        self.impl = impl  # type: ignore[assignment]  # of each instance
        self.kind, self.place, self.optional = kind, place, optional
        self.is_record = isinstance(impl, JSON)  # as text, where JSON is too narrow

    def at(self, column: Column[Any]) -> Checked:
        """Return the type for one column."""
        place = f"{column.table.name}.{column.name}"
        return Checked(self.impl_instance, self.kind, place, optional=bool(column.nullable))

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        if value is None or not self.is_record:
            return value
        return plain(value) if isinstance(self.impl, JSON) else to_json(value)

    def result_processor(self, dialect: Dialect, coltype: Any) -> Callable[[Any], Any]:
        """Return what makes a value of Python from one of the database."""
        process = self._reader(dialect, coltype)

        def checked(value: Any) -> Any:
            if value is None and self.optional:
                return None
            if value is None:
                raise BadValueError(f"{self.place} is empty")
            try:
                return process(value)
            except (ValueError, TypeError, OverflowError) as error:
                raise BadValueError(f"{self.place}: {first_line(error)}") from error

        return checked

    def _reader(self, dialect: Dialect, coltype: Any) -> Callable[[Any], Any]:
        if self.is_record:
            # An empty column of JSON may hold the text `null`, too.
            return partial(read, self.kind | None if self.optional else self.kind)
        if isinstance(self.impl, Boolean):  # SQLAlchemy takes any text for true
            return lambda value: check(self.kind, bool(value) if value in (0, 1) else value)
        convert = self.impl_instance.dialect_impl(dialect).result_processor(dialect, coltype)
        return lambda value: check(self.kind, convert(value) if convert else value)
