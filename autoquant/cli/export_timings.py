"""`autoquant export-timings`: print every timing of a database as CSV or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from autoquant.cli.output import Database, JsonFlag, csv_text, echo, opened_store
from autoquant.files import write_file


def export_timings(
    database: Database,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Only devices with this in their name.", show_default="all"
        ),
    ] = "",
    as_csv: Annotated[
        bool, typer.Option("--csv", help="CSV; so it is if nothing else is asked for.")
    ] = False,
    as_json: JsonFlag = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write into a file, not to stdout.", show_default=False),
    ] = None,
) -> None:
    """Print every timing of a database, as CSV or JSON.

    Columns: device, versions, protocol, shape, rows m, candidate, outcome, latency and spread.
    """
    if as_json and as_csv:
        raise typer.BadParameter("cannot be combined with --csv", param_hint="--json")
    if out is not None:
        _check_out(out, database)
    from autoquant.report.json_output import dumps
    from autoquant.store.export import timing_rows

    with opened_store(database) as store:
        rows = timing_rows(store, device)
    text = f"{dumps(rows)}\n" if as_json else _csv(rows)
    if out is None:
        echo(text, nl=False)
    else:
        write_file(out, text.encode())
        echo(f"wrote {out}", err=True)


def _check_out(out: Path, database: str) -> None:
    """Refuse to overwrite the database that is read.

    Raises:
        AutoquantError: `out` is that database.
    """
    from autoquant.errors import AutoquantError

    if out.exists() and Path(database).exists() and out.samefile(database):
        raise AutoquantError(f"{out} is the database itself: choose another file with --out")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    from autoquant.store.export import COLUMNS

    return csv_text(
        COLUMNS,
        (
            {**row, "versions": "; ".join(f"{name} {v}" for name, v in row["versions"].items())}
            for row in rows
        ),
    )
