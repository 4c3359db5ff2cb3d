"""What commands share: open a study; write tables, JSON and files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    from autoquant.store.connect import open_existing

    store = open_existing(database)
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
        from autoquant.store.addresses import shown_address

        echo(
            f"interrupted: everything measured so far is kept in {shown_address(database)}; the"
            " same command goes on from there",
            err=True,
        )
        raise typer.Exit(130) from None


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text. Nothing that a file or a model put into it can steer the terminal."""
    from autoquant.report.visible import visible

    typer.echo(visible(text), err=err, nl=nl)


def confirmed(question: str) -> bool:
    """Ask on stderr, since stdout is for results. Anything but yes means no."""
    echo(f"{question} [y/N]: ", err=True, nl=False)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def print_json(value: Any) -> None:
    """Print one JSON document."""
    from autoquant.report.json_output import dumps

    echo(dumps(value))


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header. Fields that are no columns are left out."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def print_table(
    make: Callable[[int], RenderableType], *, narrowest: int = _NARROWEST_TABLE
) -> None:
    """Print what `make` returns for the terminal's width; without a terminal, for 80 columns.

    Args:
        narrowest: A narrower terminal wraps the lines: cells cut to its width would lose ids and
            numbers.
    """
    from rich.console import Console

    from autoquant.report.tables.layout import Visible

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.width = max(console.width, narrowest)
    console.print(Visible(make(console.width)))


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
