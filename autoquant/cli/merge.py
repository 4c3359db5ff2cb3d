"""`autoquant merge`: copy what another database has measured into this one."""

from __future__ import annotations

from typing import Annotated

import typer

from autoquant.cli.output import Database, echo, opened_store


def merge(
    database: Database,
    other: Annotated[
        str,
        typer.Argument(
            metavar="OTHER.DB", help="Database to copy from; it is only read.", show_default=False
        ),
    ],
) -> None:
    """Copy what OTHER.DB has measured of devices and unquantized models into PLAN.DB.

    Timings, rooflines, losses and task scores of unquantized models are copied: all of them or, on
    an error, none. What PLAN.DB holds already is kept. Studies, with their plans, proofs and task
    scores, are not copied: a search in PLAN.DB makes them again and times nothing twice.
    """
    from autoquant.store.merge import merge as copy_facts

    with opened_store(database) as store:
        merged = copy_facts(store, other)
    for name, rows in merged.items():
        echo(f"{name:<12}{rows.added:>8} added{rows.known:>8} known")
