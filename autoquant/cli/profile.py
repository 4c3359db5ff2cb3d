"""`autoquant profile`: time linears without a search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.options import (
    BatchOption,
    CandidatesOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelFactoryOption,
    TokenizerOption,
    TrustPickleOption,
    TrustRemoteCodeOption,
    WorkloadOption,
)
from autoquant.cli.output import (
    JsonFlag,
    check_place,
    csv_text,
    echo,
    interruptible,
    print_json,
    print_table,
)
from autoquant.cli.trust import trusting
from autoquant.files import write_file

if TYPE_CHECKING:
    from autoquant.profiler.latencies import Latencies


def profile(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Model whose linears are timed, as for search.",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Instead of a model: a linear a line, e.g. 4096x4096+bias q_proj.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="M,...", help="Rows of the activation, e.g. 1,16,128,2048.", show_default=False
        ),
    ] = None,
    workload: WorkloadOption = None,
    batch: BatchOption = 1,
    candidates: CandidatesOption = None,
    db: Annotated[
        str, typer.Option(metavar="FILE", help="Database that keeps the timings.")
    ] = "timings.db",
    as_json: JsonFlag = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of text.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw latency against rows into a .png, .svg or .html.",
            show_default=False,
        ),
    ] = None,
    model_factory: ModelFactoryOption = None,
    tokenizer: TokenizerOption = None,
    trust_pickle: TrustPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Time the linears of MODEL, or of a file of shapes, by every candidate, without a search.

    Timings that the database holds already are not made again. Ctrl-C keeps those made so far.
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

    from autoquant.models import ModelRequest  # imports torch, as what follows does
    from autoquant.tuner.profile import time_linears
    from autoquant.tuner.profile_request import ProfileRequest, ShapesRequest, linears_of

    def timed(**code: Any) -> Latencies:
        on: dict[str, Any] = {"dtype": dtype.value, "device": device}
        asked_model = asked_shapes = None
        if model is not None:
            asked_model = ModelRequest(model=model, tokenizer=tokenizer, **on, **code)
        if shapes is not None:
            asked_shapes = ShapesRequest(shapes=shapes, **on)
        asked = ProfileRequest(
            linears=linears_of(asked_model, asked_shapes),
            rows=all_m,
            workload=request,
            batch=batch,
            candidates=tuple(candidates or ("*",)),
            db=db,
        )
        with interruptible(db), listening() as listener:
            return time_linears(asked, listener)

    latencies = trusting(
        timed,
        trust_pickle=trust_pickle,
        trust_remote_code=trust_remote_code,
        model_factory=model_factory,
    )
    if plot is not None:
        _draw(latencies, plot)
    _print(latencies, as_json=as_json, as_csv=as_csv)


def _check_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is timed."""
    from autoquant.report.latency_plot import SUFFIXES

    if path.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(
            f"{path} must end in one of {', '.join(SUFFIXES)}", param_hint="--plot"
        )
    check_place(path)


def _draw(latencies: Latencies, path: Path) -> None:
    from autoquant.report.latency_plot import render_latencies

    write_file(path, render_latencies(latencies, path.suffix.lower()))
    echo(f"wrote {path}", err=True)


def _print(latencies: Latencies, *, as_json: bool, as_csv: bool) -> None:
    if as_json:
        print_json(latencies.rows)
    elif as_csv:
        from autoquant.profiler.latencies import COLUMNS

        echo(csv_text(COLUMNS, latencies.rows), nl=False)
    else:
        from autoquant.report.tables.profile import latencies_report

        print_table(lambda width: latencies_report(latencies, width))
