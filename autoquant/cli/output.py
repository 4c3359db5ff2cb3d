"""What commands share: open a study; write tables, JSON and files."""

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

Database = Annotated[
    str, typer.Argument(metavar="PLAN.DB", help="Database that a search wrote.", show_default=False)
]
_NARROWEST_TABLE = 80
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@contextmanager
def opened_store(database: str) -> Iterator[Store]:
    """Open an existing database, and close it at the end."""
    from autoquant.store import open_store

    store = open_store(database, create=False)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def opened_study(
    database: str, *, study_id: str | None = None, plan_id: str | None = None
) -> Iterator[Study]:
    """Open a study: the one named, the one of a plan, or the one last worked on."""
    from autoquant.study.study import Study

    with opened_store(database) as store:
        yield Study(store, store.plan(plan_id).study_id if plan_id is not None else study_id)


@contextmanager
def interruptible(database: str) -> Iterator[None]:
    """Say on Ctrl-C that nothing measured is lost, and end the command."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted: everything measured so far is kept in {database}; the same command"
            " goes on from there",
            err=True,
        )
        raise typer.Exit(130) from None


def print_json(value: Any) -> None:
    """Print one JSON document."""
    from autoquant.report.json_output import dumps

    typer.echo(dumps(value))


def print_table(make: Callable[[int], RenderableType]) -> None:
    """Print what `make` returns for the terminal's width; without a terminal, for 80 columns.

    A narrower terminal wraps the lines: cells cut to its width would lose ids and numbers.
    """
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    console.width = max(console.width, _NARROWEST_TABLE)
    console.print(make(console.width))


def check_place(path: Path) -> None:
    """Refuse a file that could not be written, before long work is done for it.

    Raises:
        AutoquantError: It is a folder, or its folder cannot be written into.
    """
    from autoquant.errors import AutoquantError
    from autoquant.files import is_writable

    if path.is_dir():
        raise AutoquantError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir() or not is_writable(path.parent):
        raise AutoquantError(
            f"cannot write {path}: {path.parent} is not a folder that can be written into; make it"
            " first, or choose another place"
        )


def write_file(path: Path, content: bytes) -> None:
    """Write a file.

    Raises:
        AutoquantError: The place is not writable; nothing is left there.
    """
    from autoquant.errors import AutoquantError

    try:
        path.write_bytes(content)
    except OSError as error:
        raise AutoquantError(f"cannot write {path}: {error.strerror or error}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file at once: a reader finds the old content or all of the new.

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
