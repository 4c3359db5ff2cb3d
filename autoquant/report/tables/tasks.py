"""The scores of models on tasks as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from rich.table import Table
from rich.text import Text

from autoquant.records import TaskScore
from autoquant.report import units
from autoquant.report.tables.layout import WIDE, plain_table

_LEAST_LABEL = 8


class TaskLine(Protocol):
    """What is read from `autoquant.tuner.tasks.TaskRow`."""

    @property
    def plan_id(self) -> str | None: ...

    @property
    def label(self) -> str: ...

    @property
    def scores(self) -> tuple[TaskScore, ...]: ...


def task_table(rows: Sequence[TaskLine], width: int = 80) -> Table:
    """Return a table of each task, metric and plan. The first row is the unquantized model."""
    table = plain_table(expand=width < WIDE)
    table.add_column("Task", overflow="fold")
    table.add_column("Metric", overflow="fold")
    table.add_column("Samples", justify="right", no_wrap=True)
    table.add_column("Unquantized", justify="right", no_wrap=True)
    table.add_column("Quantized", justify="right", no_wrap=True)
    table.add_column("Plan", overflow="fold", ratio=1, min_width=_LEAST_LABEL)
    unquantized, *plans = rows
    for score in unquantized.scores:
        for plan in plans:
            samples = units.MISSING if score.samples is None else str(score.samples)
            values = (_value(score), _value(_same(plan, score)))
            cells = (score.task, score.metric, samples, *values, plan.label)
            table.add_row(*map(Text, cells))
    return table


def task_objects(rows: Sequence[TaskLine]) -> list[dict[str, Any]]:
    """Return a JSON object for each model, task and metric."""
    return [
        {"plan_id": row.plan_id, "label": row.label, **asdict(score)}
        for row in rows
        for score in row.scores
    ]


def _same(row: TaskLine, other: TaskScore) -> TaskScore | None:
    """Return the row's score of the same task and metric, or None."""
    wanted = (other.task, other.metric)
    return next((score for score in row.scores if (score.task, score.metric) == wanted), None)


def _value(score: TaskScore | None) -> str:
    """Return the value and its standard error, with the same decimals."""
    if score is None:
        return units.MISSING
    decimals = 4 if abs(score.value) < 10 else 2
    error = "" if score.stderr is None else f" ± {score.stderr:.{decimals}f}"
    return f"{score.value:.{decimals}f}{error}"
