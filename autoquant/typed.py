"""Check what is read from files against types: records, ranges, shapes of JSON."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

_SHOWN_CHARACTERS = 60


class ShapeError(ValueError):
    """A value is not of its type. The message has the place within the value, and no file."""


def read(kind: Any, text: str | bytes) -> Any:
    """Return the value of a type that a JSON text holds.

    Raises:
        ShapeError: The text is no JSON, or holds another value.
    """
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise ShapeError(_first(error)) from error


def check(kind: Any, value: Any) -> Any:
    """Return a value that is of a type.

    Raises:
        ShapeError: It is not.
    """
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        raise ShapeError(_first(error)) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first(error: ValidationError) -> str:
    """Return the first of the problems, with its place."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    shown = repr(problem["input"])
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[: _SHOWN_CHARACTERS - 3] + "..."
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{place}: {message}, not {shown}" if place else f"{message}, not {shown}"
