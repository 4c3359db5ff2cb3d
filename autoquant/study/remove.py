"""Remove a study together with what Optuna keeps of it in the same database."""

from __future__ import annotations

from dataclasses import dataclass

from autoquant.solver.refine import forget
from autoquant.store import Store
from autoquant.store.remove import RemovedRows, remove_study


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """The removed rows, and the number of Optuna's trials (None: it had no study)."""

    rows: RemovedRows
    trials: int | None


def remove(store: Store, study_id: str) -> Removed:
    """Delete a study, Optuna's first, so that a second call finishes an interrupted one."""
    trials = forget(store, study_id)
    return Removed(rows=remove_study(store, study_id), trials=trials)
