"""What the commands share: opening a study, and writing tables, lines and JSON to stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from autoquant.store import Store
    from autoquant.study.study import Study

Database = Annotated[str, typer.Argument(metavar="PLAN.DB", help="Database that a search wrote.", show_default=False)]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@contextmanager
def opened_store(database: str) -> Iterator[Store]:
    """An existing database, closed at the end."""
    from autoquant.store import open_store

    store = open_store(database, create=False)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def opened_study(database: str, *, study_id: str | None = None, plan_id: str | None = None) -> Iterator[Study]:
    """A study of an existing database: the one named, the one of a plan, or the one last worked on."""
    from autoquant.study.study import Study

    with opened_store(database) as store:
        yield Study(store, store.plan(plan_id).study_id if plan_id is not None else study_id)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    from autoquant.report.json_output import dumps

    typer.echo(dumps(value))


def print_table(make: Callable[[int], RenderableType]) -> None:
    """Draw what `make` makes for the width of the terminal, or for 80 columns where there is none."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    console.print(make(console.width))


def check_place(path: Path) -> None:
    """Refuse, before long work is done, a file that could not be written after it.

    Raises:
        AutoquantError: It lies in no folder that can be written into.
    """
    from autoquant.errors import AutoquantError
    from autoquant.files import is_writable

    if path.is_dir():
        raise AutoquantError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir() or not is_writable(path.parent):
        raise AutoquantError(
            f"cannot write {path}: {path.parent} is not a folder that can be written into; make it first, or choose another place"
        )


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one go.

    Raises:
        AutoquantError: The place is not writable; nothing is left there.
    """
    from autoquant.errors import AutoquantError

    try:
        path.write_bytes(content)
    except OSError as error:
        raise AutoquantError(f"cannot write {path}: {error.strerror or error}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that whoever opens it finds all of it, or what was there before.

    Raises:
        AutoquantError: The place is not writable; what was there is untouched.
    """
    import os
    import tempfile
    from contextlib import suppress

    from autoquant.errors import AutoquantError

    try:
        descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(scratch, 0o666 & ~mask)
            os.replace(scratch, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(scratch)
            raise
    except OSError as error:
        raise AutoquantError(f"cannot write {path}: {error.strerror or error}") from error
