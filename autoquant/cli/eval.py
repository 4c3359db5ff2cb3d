"""`autoquant eval`: score plans and the unquantized model on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autoquant.cli.options import (
    ModelFactoryOption,
    SampleInputsOption,
    TrustPickleOption,
    TrustRemoteCodeOption,
)
from autoquant.cli.output import Database, JsonFlag, opened_study, print_json, print_table
from autoquant.cli.plans import ModelOption, PlansOption, chosen_plans, source_path
from autoquant.cli.trust import trusting


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
            metavar="DIR",
            help="Folder of further task files (YAML). They may run code.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Samples of each task.", show_default="all"),
    ] = None,
    model: ModelOption = None,
    trust_pickle: TrustPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    model_factory: ModelFactoryOption = None,
    sample_inputs: SampleInputsOption = None,
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
        from autoquant.models.trust import Trust
        from autoquant.tuner.tasks import TaskRow, score_tasks

        given = Tasks(names, folder=tasks_path, limit=limit)

        def scored(**code: Any) -> list[TaskRow]:
            with listening() as listener:
                return score_tasks(
                    plans, source, study.facts, given, study.store, listener, trust=Trust(**code)
                )

        rows = trusting(
            scored,
            trust_pickle=trust_pickle,
            trust_remote_code=trust_remote_code,
            model_factory=model_factory,
            sample_inputs=sample_inputs,
        )
    from autoquant.report.tables.tasks import task_objects, task_table

    if as_json:
        print_json(task_objects(rows))
    else:
        print_table(lambda width: task_table(rows, width))
