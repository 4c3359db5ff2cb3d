"""Remove a study together with what Optuna keeps of it in the same database."""

from __future__ import annotations

from dataclasses import dataclass

from autoquant.solver.refine import forget
from autoquant.store import Store
from autoquant.store.remove import RemovedRows, remove_study


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What was removed: our rows, and the trials of Optuna's study (None: it had none)."""

    rows: RemovedRows
    trials: int | None


def remove(store: Store, study_id: str) -> Removed:
    """Delete a study. Optuna's goes first, so that a second call finishes what was cut short."""
    trials = forget(store, study_id)
    return Removed(rows=remove_study(store, study_id), trials=trials)
