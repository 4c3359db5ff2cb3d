"""`autoquant studies`: list the searches that a database holds."""

from __future__ import annotations

from autoquant.cli.output import Database, JsonFlag, echo, opened_store, print_json, print_table


def studies(database: Database, as_json: JsonFlag = False) -> None:
    """List the studies of a database.

    The one last worked on comes first: other commands take it by default.
    """
    from autoquant.report.tables.studies import studies_objects, studies_table
    from autoquant.study.overview import study_rows

    with opened_store(database) as store:
        rows = study_rows(store)
    if as_json:
        print_json(studies_objects(rows))
    elif rows:
        print_table(lambda _width: studies_table(rows))
    else:
        echo("This database holds no study yet: run `autoquant search` first.")
