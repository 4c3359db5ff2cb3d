"""`autoquant pareto`: show the measured front as text, JSON, CSV or a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.output import (
    Database,
    JsonFlag,
    check_place,
    csv_text,
    echo,
    opened_study,
    print_json,
    print_table,
)
from autoquant.cli.plans import StudyOption
from autoquant.files import write_file

if TYPE_CHECKING:
    from autoquant.study.study import Study


def pareto(
    database: Database,
    study: StudyOption = None,
    as_json: JsonFlag = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of text.")] = False,
    chart: Annotated[
        bool, typer.Option("--chart", help="Also draw the front in characters, below the table.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the front into a .png or .svg file.", show_default=False
        ),
    ] = None,
) -> None:
    """Show the proven plans, fastest first: request time, quality and memory, all measured."""
    if as_json and as_csv:
        raise typer.BadParameter("cannot be combined with --csv", param_hint="--json")
    if chart and (as_json or as_csv):
        raise typer.BadParameter("cannot be combined with --json or --csv", param_hint="--chart")
    if plot is not None:
        _check_suffix(plot)
        check_place(plot)
    with opened_study(database, study_id=study) as opened:
        rows = opened.rows()
        if plot is not None:
            _draw(opened, rows, plot)
        if as_json:
            print_json(rows)
        elif as_csv:
            _print_csv(rows)
        else:
            _print_text(opened, rows, chart=chart)


def _check_suffix(path: Path) -> None:
    from autoquant.report.front.picture import SUFFIXES

    if path.suffix.lower() == ".html":
        raise typer.BadParameter(
            f"draws pictures; `autoquant report DATABASE --out {path}` writes the front as a page",
            param_hint="--plot",
        )
    if path.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(
            f"{path} must end in one of {', '.join(SUFFIXES)}", param_hint="--plot"
        )


def _draw(study: Study, rows: list[dict[str, Any]], path: Path) -> None:
    from autoquant.errors import PlanError
    from autoquant.report.front.picture import render
    from autoquant.report.words import study_line

    if not rows:
        raise PlanError(
            "there is nothing to draw: no plan has been proven yet, run `autoquant search` to"
            " the end"
        )
    facts = study.facts
    write_file(
        path,
        render(rows, path.suffix.lower(), study_line(facts.source, facts.device, facts.workload)),
    )
    echo(f"wrote {path}", err=True)


def _print_csv(rows: list[dict[str, Any]]) -> None:
    from autoquant.study.columns import COLUMNS

    echo(csv_text(COLUMNS, rows), nl=False)


def _print_chart(rows: list[dict[str, Any]]) -> None:
    from autoquant.report.front.chart import FrontChart

    print_table(lambda _width: FrontChart(rows))
    echo()


def _print_text(study: Study, rows: list[dict[str, Any]], *, chart: bool) -> None:
    from autoquant.report.tables.plans import front_table, uncovered_lines
    from autoquant.report.words import (
        constraints_words,
        exception_lines,
        left_out_lines,
        recommendation,
        study_line,
    )

    facts = study.facts
    echo(f"Study {facts.study_id}: {study_line(facts.source, facts.device, facts.workload)}")
    if constrained := constraints_words(facts.constraints):
        echo(f"Constraints: {constrained}")
    if not facts.complete:
        echo("This search has not come to its end; the same `autoquant search` goes on from here.")
    echo()
    if rows:
        print_table(lambda width: front_table(rows, width))
        echo()
    if rows and chart:
        _print_chart(rows)
    echo(recommendation(rows, facts.limits, facts.workload))
    for line in [
        *uncovered_lines(facts.recording),
        *exception_lines(study.proofs().values()),
        *left_out_lines(study.left_out()),
    ]:
        echo(line)
    if ended := study.refinement_ended():
        echo(f"Refinement: {ended}.")
    for plan_id, reason in study.store.failed_proofs(study.study_id).items():
        echo(f"Plan {plan_id} could not be proven: {reason}")
