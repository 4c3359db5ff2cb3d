"""`autoquant repair`: save what is whole of a damaged database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoquant.cli.output import Database, echo

if TYPE_CHECKING:
    from autoquant.store.repair import SavedRows


def repair(
    database: Database,
    out: Annotated[
        Path,
        typer.Option(metavar="NEW.DB", help="The new database; no file may be there."),
    ],
) -> None:
    """Copy every valid row of PLAN.DB into a new database, and say what was lost.

    PLAN.DB is only read. A row is copied if all its values are valid, and the rows that it refers
    to are copied, too. What Optuna keeps of a refinement is not copied: a search starts it again
    from the proven plans.
    """
    from autoquant.store.repair import repair as save_whole

    saved = save_whole(database, out)
    for table, rows in saved.items():
        echo(f"{table.replace('_', ' '):<12}{rows.saved:>8} saved{rows.lost:>8} lost{_more(rows)}")
    echo(f"Wrote {out}.")
    if not all(rows.whole for rows in saved.values()):
        echo(f"The same search with --db {out} measures again only what is lost.")


def _more(rows: SavedRows) -> str:
    notes = []
    if rows.emptied:
        notes.append(f"{rows.emptied} values left out")
    if rows.unreadable:
        notes.append("some could not be read")
    if rows.missing:
        notes.append("no such table was found")
    if rows.reason:
        notes.append(f"{'the first: ' if rows.lost + rows.emptied > 1 else ''}{rows.reason}")
    return f"  ({', '.join(notes)})" if notes else ""
