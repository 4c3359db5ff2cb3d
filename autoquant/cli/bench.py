"""`autoquant bench`: plans timed again in the whole model, in turn with the unquantized one."""

from __future__ import annotations

from typing import Annotated

import typer

from autoquant.cli.output import Database, JsonFlag, opened_study, print_json, print_table
from autoquant.cli.plans import ModelOption, PlansOption, chosen_plans, source_path


def bench(
    database: Database,
    plan: PlansOption = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Also all proven plans of a kind: uniform or front.", show_default=False),
    ] = None,
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Time plans in the whole model, compiled, in turn with the unquantized model, and compare with what was predicted."""
    if compare is not None and compare not in ("uniform", "front"):
        raise typer.BadParameter(f"{compare!r} is neither uniform nor front", param_hint="--compare")
    from autoquant.report.progress import listening

    with opened_study(database, plan_id=plan[0] if plan else None) as study:
        plans = chosen_plans(study, plan or [], compare)
        source = model or source_path(study)
        from autoquant.tuner.bench import bench as measure  # imports torch: after all that can be refused without it

        with listening() as listener:
            rows = measure(plans, source, study.facts, listener)
        workload = study.facts.workload
    if as_json:
        from autoquant.report.bench_table import bench_objects

        print_json(bench_objects(rows, workload))
        return
    from autoquant.report.bench_table import bench_notes, bench_table

    print_table(lambda width: bench_table(rows, workload, width))
    for note in bench_notes(rows):
        typer.echo(note)
