"""`autoquant eval`: score plans and the unquantized model on tasks, or by labels."""

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
        str | None,
        typer.Option(
            metavar="NAME,...", help="Tasks of lm-eval, or of --tasks-path.", show_default=False
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:CONFIG][:SPLIT][:COLUMN]",
            help="Instead of tasks: a dataset with labels, for classifiers and models with an"
            " encoder and a decoder.",
            show_default=False,
        ),
    ] = None,
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
    """Score plans and the unquantized model on the same tasks, or by the same labels.

    Tasks are those of lm-evaluation-harness. The scores are kept in the database.
    """
    if labels is not None and (tasks is not None or tasks_path is not None):
        raise typer.BadParameter("cannot be combined with --tasks", param_hint="--labels")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names and labels is None:
        raise typer.BadParameter(
            "give one or more names of tasks, separated by commas, or --labels DATASET",
            param_hint="--tasks",
        )
    from autoquant.report.progress import listening

    with opened_study(database, plan_id=plan[0] if plan else None) as study:
        plans = chosen_plans(study, plan or [])
        source = model or source_path(study)
        # These import torch: after all that can be refused without it.
        from autoquant.models.trust import Trust
        from autoquant.tuner.tasks import TaskRow

        def scored(**code: Any) -> list[TaskRow]:
            trust = Trust(**code)
            with listening() as listener:
                if labels is not None:
                    from autoquant.tuner.labels import score_labels

                    return score_labels(
                        plans,
                        source,
                        study.facts,
                        labels,
                        study.store,
                        listener,
                        limit=limit,
                        trust=trust,
                    )
                from autoquant.evaluators.tasks import Tasks
                from autoquant.tuner.tasks import score_tasks

                given = Tasks(names, folder=tasks_path, limit=limit)
                return score_tasks(
                    plans, source, study.facts, given, study.store, listener, trust=trust
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
