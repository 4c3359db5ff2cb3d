"""`autoquant profile`: time linears without a search; table, CSV, JSON, and a picture with the roofline."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoquant.cli.output import JsonFlag, check_place, print_json, print_table, write_file
from autoquant.cli.search import Dtype

if TYPE_CHECKING:
    from autoquant.profiler.latencies import Latencies


def profile(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Model whose linears are timed, as for search.", show_default=False),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Instead of a model: a linear a line, e.g. 4096x4096+bias q_proj.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (cuda, then mps, then cpu) or a device.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Precision of the unquantized linears.")] = Dtype.AUTO,
    rows: Annotated[
        str | None,
        typer.Option(metavar="M,...", help="Rows of the activation, e.g. 1,16,128,2048.", show_default=False),
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help="Rows as one request has them, e.g. prefill=2048,decode=256.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    candidates: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Candidates to time, repeatable. Default: all.", show_default=False),
    ] = None,
    db: Annotated[str, typer.Option(metavar="FILE", help="Database that keeps the timings.")] = "timings.db",
    as_json: JsonFlag = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of text.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw latency against rows into a .png, .svg or .html.", show_default=False),
    ] = None,
    model_factory: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:CALLABLE", help="Builds the module of a state dict.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Tokenizer, where the model has none of its own.", show_default=False),
    ] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Load a pickled model: runs the code that is in it.")
    ] = False,
) -> None:
    """Time the linears of MODEL, or of a file of shapes, by every candidate, without a search.

    What the database holds already is not timed again. Ctrl-C keeps everything measured so far.
    """
    if as_json and as_csv:
        raise typer.BadParameter("cannot be combined with --csv", param_hint="--json")
    if plot is not None:
        _check_plot(plot)

    from autoquant.profiler.shapes import parse_rows
    from autoquant.records import Workload
    from autoquant.report.progress import listening

    all_m = None if rows is None else parse_rows(rows)
    request = None if workload is None else Workload.parse(workload, batch)

    from autoquant.tuner.profile import ProfileRequest, time_linears  # imports torch

    try:
        with listening() as listener:
            latencies = time_linears(
                ProfileRequest(
                    model=model,
                    shapes=shapes,
                    rows=all_m,
                    workload=request,
                    batch=batch,
                    device=device,
                    dtype=dtype.value,
                    candidates=tuple(candidates or ("*",)),
                    db=db,
                    model_factory=model_factory,
                    tokenizer=tokenizer,
                    trust_pickle=trust_pickle,
                ),
                listener,
            )
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted: everything measured so far is kept in {db}; the same command goes on from there", err=True
        )
        raise typer.Exit(130) from None
    if plot is not None:
        _draw(latencies, plot)
    _print(latencies, as_json=as_json, as_csv=as_csv)


def _check_plot(path: Path) -> None:
    """Refuse before anything is timed what could not be written afterwards."""
    from autoquant.report.latency_plot import SUFFIXES

    if path.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"{path} must end in one of {', '.join(SUFFIXES)}", param_hint="--plot")
    check_place(path)


def _draw(latencies: Latencies, path: Path) -> None:
    from autoquant.report.latency_plot import render_latencies

    write_file(path, render_latencies(latencies, path.suffix.lower()))
    typer.echo(f"wrote {path}", err=True)


def _print(latencies: Latencies, *, as_json: bool, as_csv: bool) -> None:
    if as_json:
        print_json(latencies.rows)
    elif as_csv:
        from autoquant.profiler.latencies import COLUMNS

        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(latencies.rows)
    else:
        from autoquant.report.tables.profile import latencies_report

        print_table(lambda width: latencies_report(latencies, width))
