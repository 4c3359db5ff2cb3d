"""Read and write facts, one transaction each. Only the store knows the tables."""

from __future__ import annotations

from autoquant.store.losses import Losses
from autoquant.store.plans import Plans
from autoquant.store.studies import Studies
from autoquant.store.task_scores import TaskScores
from autoquant.store.timings import Timings


class Store(Timings, Losses, Studies, Plans, TaskScores):
    """Facts under their keys, in one database."""

    def close(self) -> None:
        self.engine.dispose()
