"""Scores of plans and models in tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from sqlalchemy import select

from autoquant.records import (
    TaskScore,
)
from autoquant.store.rows import (
    task_score_from,
)
from autoquant.store.schema import (
    TaskScoreRow,
    now,
)
from autoquant.store.transactions import Transactions


class TaskScores(Transactions):
    """What plans and models score in tasks."""

    def put_task_scores(self, subject: str, dtype: str, scores: Iterable[TaskScore]) -> None:
        """Save task scores, and replace earlier ones of the same measurement.

        Args:
            subject: Id of a plan, or content hash of the unquantized model.
        """
        with self._writing() as session:
            for score in scores:
                columns = asdict(score)
                columns["samples_limit"] = columns.pop("limit") or 0
                found = {name: columns.pop(name) for name in ("value", "stderr", "samples")}
                key = {"subject": subject, "dtype": dtype, **columns}
                row = session.scalars(select(TaskScoreRow).filter_by(**key)).first()
                if row is None:
                    session.add(TaskScoreRow(**key, **found))
                else:
                    row.value, row.stderr, row.samples, row.created = *found.values(), now()

    def task_scores(self, subject: str, dtype: str) -> list[TaskScore]:
        """Return the task scores of a subject, the first measured first.

        Args:
            subject: Id of a plan, or content hash of the unquantized model.
        """
        with self._session() as session:
            rows = session.scalars(
                select(TaskScoreRow)
                .filter_by(subject=subject, dtype=dtype)
                .order_by(TaskScoreRow.id)
            )
            return [task_score_from(row) for row in rows]
