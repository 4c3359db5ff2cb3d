"""`autoquant bench`: plans timed again in the whole model, in turn with the unquantized one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from autoquant.cli.apply import source_path
from autoquant.cli.output import Database, JsonFlag, opened_study, print_json, print_table
from autoquant.cli.show import recommended_plan

if TYPE_CHECKING:
    from autoquant.records import Plan
    from autoquant.tuner.study import Study


def bench(
    database: Database,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID", help="Which plan (the beginning of its id will do); repeatable.", show_default="recommended"
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Also all proven plans of a kind: uniform or front.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Where the model is, if not where it was.", show_default=False),
    ] = None,
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


def chosen_plans(study: Study, ids: list[str], kind: str | None) -> list[Plan]:
    """The plans named, or the recommended one; then those of the kind. The unquantized model takes part anyway."""
    from autoquant.errors import PlanError

    named = [study.plan(plan_id) for plan_id in ids] or [recommended_plan(study)]
    if others := {each.study_id for each in named} - {study.study_id}:
        raise PlanError(f"the plans are of different studies ({study.study_id} and {others.pop()}): give those of one")
    proven = study.proofs()
    named += [each for each in study.plans() if each.kind == kind and each.plan_id in proven]
    chosen = {each.plan_id: each for each in named if each.kind != "original"}
    if not chosen:
        raise PlanError("the unquantized model takes part anyway: say with --plan which plan to set beside it")
    return list(chosen.values())
