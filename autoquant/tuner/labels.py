"""Score plans and the unquantized model by how many labels of a dataset they get right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from autoquant.delivery.applier import applied
from autoquant.delivery.searched import load_searched
from autoquant.errors import TaskError
from autoquant.evaluators.diverging import right_labels
from autoquant.evaluators.rows import Rows, batches, dataset_rows
from autoquant.events import Listener, StageFinished, StageProgress, StageStarted, ignore, logged
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy
from autoquant.models.loaded import device_of
from autoquant.models.reader import on
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import ORIGINAL_LABEL, Plan, TaskScore
from autoquant.runtime.user_loop import generate_from
from autoquant.store import Store, StudyFacts
from autoquant.tuner.rows_judge import labels_of
from autoquant.tuner.tasks import TaskRow

_MORE_TOKENS = 8  # than the longest right answer: a longer one is wrong


def score_labels(
    plans: Sequence[Plan],
    model: str,
    facts: StudyFacts,
    data: str,
    store: Store,
    listener: Listener = ignore,
    *,
    limit: int | None = None,
    trust: Trust = NO_TRUST,
) -> list[TaskRow]:
    """Score the unquantized model and then each plan, and keep every score at once.

    A classifier is right if the label is its most likely class, and a model that answers if it
    generates the label's text, greedily.

    Args:
        plans: At least one, all of one study.
        data: A dataset with labels, as `autoquant search --eval-data` takes it.
        limit: The most rows, or None for all.

    Raises:
        TrustError: The model needs code that the user did not name.
        ModelError: Another model is at `model`.
        TaskError: The model gives no classes or answers, or the dataset has no labels.
        TextError: The dataset cannot be read.
    """
    listener = logged(listener)
    loaded = load_searched(plans[0], model, facts, None, trust)
    rows = _labelled(loaded, data, limit)
    listener(StageStarted("labels", 1 + len(plans)))
    scored = []
    for done, plan in enumerate([None, *plans]):
        label = plan.label if plan else ORIGINAL_LABEL
        listener(StageProgress("labels", done, label))
        module = shallow_copy(loaded.module)
        if plan is not None:
            module = applied(plan, loaded.module, facts.calibration)
        score = _score(loaded, module, rows, data, limit)
        scored.append(TaskRow(plan_id=plan.plan_id if plan else None, label=label, scores=(score,)))
        subject = plan.plan_id if plan else loaded.content_hash
        store.put_task_scores(subject, loaded.dtype, [score])
    samples = scored[0].scores[0].samples
    listener(StageFinished("labels", f"{len(scored)} models on {samples} labels of {data}"))
    return scored


def _labelled(loaded: LoadedModel, data: str, limit: int | None) -> tuple[Rows, ...]:
    labels = None if loaded.family is None else labels_of(loaded)
    if loaded.reader is None or labels is None:
        raise TaskError(
            "--labels scores classifiers and models that answer with an encoder and a decoder: this"
            " model is none"
        )
    answers = loaded.kind == "encoder_decoder"
    found = list(islice(dataset_rows(loaded.reader, data, 0, labels, answers=answers), limit))
    if not found or any(row.label is None and not row.answer for row in found):
        column = "target" if answers else "label"
        raise TaskError(
            f"not every row of {data} has a label: put it into a column called {column}"
        )
    return batches(loaded.reader, found)


def _score(
    loaded: LoadedModel, module: nn.Module, rows: Sequence[Rows], data: str, limit: int | None
) -> TaskScore:
    answers = loaded.kind == "encoder_decoder"
    right = total = 0
    for each in rows:
        assert each.labels is not None  # `_labelled` saw to it
        total += len(each.labels)
        if answers:
            right += _right_answers(module, loaded.tokenizer, each)
        else:
            with torch.no_grad():
                right += right_labels(module(**on(each.inputs, device_of(module))), each)
    share = right / total
    return TaskScore(
        task=data,
        metric="exact match" if answers else "accuracy",
        value=share,
        stderr=math.sqrt(share * (1 - share) / total),
        samples=total,
        limit=limit,
        lm_eval_version="",
    )


def _right_answers(module: nn.Module, tokenizer: Any, rows: Rows) -> int:
    assert rows.labels is not None
    most = rows.labels.shape[1] + _MORE_TOKENS
    said = generate_from(module, on(rows.inputs, device_of(module)), most)
    told = tokenizer.batch_decode(said, skip_special_tokens=True)
    wanted = tokenizer.batch_decode(rows.labels, skip_special_tokens=True)
    return sum(one.strip() == other.strip() for one, other in zip(told, wanted, strict=True))
