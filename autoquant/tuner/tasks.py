"""Score plans and the unquantized model on the same tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoquant.delivery.applier import applied
from autoquant.delivery.searched import load_searched
from autoquant.devices import backend
from autoquant.errors import TaskError
from autoquant.evaluators.tasks import Tasks
from autoquant.events import Listener, StageFinished, StageProgress, StageStarted, ignore, logged
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import ORIGINAL_LABEL, Plan, TaskScore
from autoquant.store import Store, StudyFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """The scores of one model; `plan_id` is None for the unquantized one."""

    plan_id: str | None
    label: str
    scores: tuple[TaskScore, ...]


def score_tasks(
    plans: Sequence[Plan],
    model: str,
    facts: StudyFacts,
    tasks: Tasks,
    store: Store,
    listener: Listener = ignore,
    *,
    trust: Trust = NO_TRUST,
) -> list[TaskRow]:
    """Score the unquantized model and then each plan, and keep every score at once.

    Args:
        plans: At least one, all of one study.
        model: Path of the model that was searched.
        facts: The plans' study.
        store: Keeps the scores.
        trust: The code that the user named. What the study names is never run by itself.

    Raises:
        TrustError: The model needs code that the user did not name.
        ModelError: Another model is at `model`.
        TaskError: The model is no language model with a tokenizer, or a task cannot be run.
    """
    listener = logged(listener)
    loaded = load_searched(plans[0], model, facts, None, trust)
    if loaded.kind != "causal_lm" or loaded.tokenizer is None:
        raise TaskError(
            "tasks need a Hugging Face causal language model with its tokenizer: this model is none"
        )
    if loaded.stream is not None and backend(loaded.device).free_bytes() is not None:
        raise TaskError(
            f"the unquantized model does not fit into the memory of {loaded.device}, and lm-eval"
            " runs it whole: use a device with more memory"
        )
    listener(StageStarted("tasks", 1 + len(plans)))
    rows = []
    for done, plan in enumerate([None, *plans]):
        listener(StageProgress("tasks", done, plan.label if plan else ORIGINAL_LABEL))
        rows.append(_score(loaded, plan, tasks, facts))
        subject = plan.plan_id if plan else loaded.content_hash
        store.put_task_scores(subject, loaded.dtype, rows[-1].scores)
    listener(StageFinished("tasks", f"{len(rows)} models on {', '.join(tasks.names)}"))
    return rows


def _score(loaded: LoadedModel, plan: Plan | None, tasks: Tasks, facts: StudyFacts) -> TaskRow:
    if plan is not None:
        module = applied(plan, loaded.module, facts.calibration)
    else:
        module = loaded.module if loaded.stream else shallow_copy(loaded.module)
    scores = tasks.score(module, loaded.tokenizer)
    return TaskRow(
        plan_id=plan.plan_id if plan else None,
        label=plan.label if plan else ORIGINAL_LABEL,
        scores=scores,
    )
