"""`autoquant eval`: score plans and the unquantized model on tasks, or by labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.options import (
    KvCacheKind,
    ModelFactoryOption,
    SampleInputsOption,
    TrustPickleOption,
    TrustRemoteCodeOption,
)
from autoquant.cli.output import Database, JsonFlag, opened_study, print_json, print_table
from autoquant.cli.plans import ModelOption, PlansOption, chosen_plans, source_path
from autoquant.cli.trust import trusting

if TYPE_CHECKING:
    from autoquant.records import KvCache, Plan
    from autoquant.store import StudyFacts


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
    kv_cache: Annotated[
        list[KvCacheKind] | None,
        typer.Option(
            help="Instead of tasks: perplexity with keys and values in 8 bits, beside that without;"
            " repeatable.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="TOKENS",
            help="With --kv-cache: length of each window.",
            show_default="of a request of the search",
        ),
    ] = None,
    eval_text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --kv-cache: a text like what the model will read.",
            show_default="one that autoquant ships",
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
    """Score plans and the unquantized model on the same tasks, labels or long windows of text.

    Tasks are those of lm-evaluation-harness. Their scores, and those by labels, are kept in the
    database.
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    _check(names, tasks_path, labels, kv_cache, context, eval_text)
    from autoquant.report.progress import listening

    with opened_study(database, plan_id=plan[0] if plan else None) as study:
        plans = chosen_plans(study, plan or [])
        source = model or source_path(study)
        code = {
            "trust_pickle": trust_pickle,
            "trust_remote_code": trust_remote_code,
            "model_factory": model_factory,
            "sample_inputs": sample_inputs,
        }
        if kv_cache:
            contexts = partial(
                _contexts, plans, source, study.facts, kv_cache, context, eval_text, as_json
            )
            return trusting(contexts, **code)
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

        rows = trusting(scored, **code)
    from autoquant.report.tables.tasks import task_objects, task_table

    if as_json:
        print_json(task_objects(rows))
    else:
        print_table(lambda width: task_table(rows, width))


def _check(
    names: Sequence[str],
    tasks_path: Path | None,
    labels: str | None,
    kv_cache: Sequence[str] | None,
    context: int | None,
    eval_text: Path | None,
) -> None:
    """Refuse options that do not go together.

    Raises:
        BadParameter: There are such, or none that says what to score by.
    """
    of_contexts = {"--context": context, "--eval-text": eval_text}
    unused = [option for option, value in of_contexts.items() if value is not None]
    if unused and not kv_cache:
        raise typer.BadParameter("needs --kv-cache", param_hint=" and ".join(unused))
    ways = {"--tasks": names or tasks_path, "--labels": labels, "--kv-cache": kv_cache}
    given = [option for option, value in ways.items() if value]
    if len(given) > 1:
        others = " and ".join(given[:-1])
        raise typer.BadParameter(f"cannot be combined with {others}", param_hint=given[-1])
    if not given or (tasks_path is not None and not names):
        raise typer.BadParameter(
            "give one or more names of tasks, separated by commas, or --labels DATASET, or"
            " --kv-cache int8",
            param_hint="--tasks",
        )


def _contexts(
    plans: Sequence[Plan],
    source: str,
    facts: StudyFacts,
    kinds: Sequence[KvCacheKind],
    context: int | None,
    text: Path | None,
    as_json: bool,
    **code: Any,
) -> None:
    """Print the perplexity at long context, with keys and values kept in each way."""
    from autoquant.models.trust import Trust
    from autoquant.report.progress import listening
    from autoquant.report.tables.contexts import context_objects, context_table
    from autoquant.tuner.contexts import score_contexts

    asked: list[KvCache] = [kind.value for kind in dict.fromkeys(kinds)]
    with listening() as listener:
        rows = score_contexts(
            plans, source, facts, asked, listener, tokens=context, text=text, trust=Trust(**code)
        )
    if as_json:
        print_json(context_objects(rows))
    else:
        print_table(lambda width: context_table(rows, width))
