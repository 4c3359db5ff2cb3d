"""`autoquant report`: write everything about a search as one HTML file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from autoquant.cli.output import Database, check_place, echo, opened_study
from autoquant.cli.plans import StudyOption
from autoquant.files import write_file

_SUFFIXES = (".html", ".htm")


def report(
    database: Database,
    out: Annotated[Path, typer.Option(metavar="FILE.HTML", help="Where to write it.")] = Path(
        "report.html"
    ),
    study: StudyOption = None,
) -> None:
    """Write a report of a search: front, plans layer by layer, kernels and coverage.

    It is one file and needs no network.
    """
    if out.suffix.lower() not in _SUFFIXES:
        raise typer.BadParameter(f"{out} must end in .html", param_hint="--out")
    check_place(out)
    from autoquant.report.html.page import render_report
    from autoquant.store.addresses import shown_address

    with opened_study(database, study_id=study) as opened:
        page = render_report(opened, shlex.quote(shown_address(database)))
    write_file(out, page)
    echo(f"wrote {out}", err=True)
