"""`autoquant eval`: score plans and the unquantized model on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoquant.cli.output import Database, JsonFlag, opened_study, print_json, print_table
from autoquant.cli.plans import ModelOption, PlansOption, chosen_plans, source_path


def evaluate(
    database: Database,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...", help="Tasks of lm-eval, or of --tasks-path.", show_default=False
        ),
    ],
    plan: PlansOption = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of further task files (YAML).", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Samples of each task.", show_default="all"),
    ] = None,
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Score plans and the unquantized model on the same tasks of lm-evaluation-harness.

    The scores are kept in the database.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(
            "give one or more names of tasks, separated by commas", param_hint="--tasks"
        )
    from autoquant.report.progress import listening

    with opened_study(database, plan_id=plan[0] if plan else None) as study:
        plans = chosen_plans(study, plan or [])
        source = model or source_path(study)
        # These import torch: after all that can be refused without it.
        from autoquant.evaluators.tasks import Tasks
        from autoquant.tuner.tasks import score_tasks

        given = Tasks(names, folder=tasks_path, limit=limit)
        with listening() as listener:
            rows = score_tasks(plans, source, study.facts, given, study.store, listener)
    from autoquant.report.tables.tasks import task_objects, task_table

    if as_json:
        print_json(task_objects(rows))
    else:
        print_table(lambda width: task_table(rows, width))
