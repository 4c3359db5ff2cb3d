"""`autoquant studies`: what searches a database holds."""

from __future__ import annotations

import typer

from autoquant.cli.output import Database, JsonFlag, opened_store, print_json, print_table


def studies(database: Database, as_json: JsonFlag = False) -> None:
    """List the studies of a database, the one last worked on first: that is the one other commands take if not told."""
    from autoquant.report.tables.studies import studies_objects, studies_table
    from autoquant.study.overview import study_rows

    with opened_store(database) as store:
        rows = study_rows(store)
    if as_json:
        print_json(studies_objects(rows))
    elif rows:
        print_table(lambda _width: studies_table(rows))
    else:
        typer.echo("This database holds no study yet: run `autoquant search` first.")
