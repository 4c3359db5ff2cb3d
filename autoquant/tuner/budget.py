"""The time that a search may take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from autoquant.devices.peaks import PeakMemory
from autoquant.stopwatch import Stopwatch
from autoquant.store import Store
from autoquant.study.study import Study

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Counts time over all runs of the same search, and keeps in the store what was spent.

    Attributes:
        limit_s: What refinement may fill up.
        started_s: When this run began, by `now_s`.
        spent_before_s: What earlier runs spent.
        memory: Knows the most memory that was taken since it was last asked.
    """

    store: Store
    study_id: str
    limit_s: float
    started_s: float
    spent_before_s: float
    now_s: Callable[[], float] = time.monotonic
    memory: PeakMemory | None = None

    @classmethod
    def of(
        cls,
        store: Store,
        study_id: str,
        limit_s: float,
        started_s: float,
        memory: PeakMemory | None = None,
    ) -> Budget:
        """Return the budget of a study's run that began at `started_s` (`time.monotonic`)."""
        spent_s = store.study(study_id).spent_s
        return cls(
            store=store,
            study_id=study_id,
            limit_s=limit_s,
            started_s=started_s,
            spent_before_s=spent_s,
            memory=memory,
        )

    def spent_s(self) -> float:
        """Return the seconds that all runs spent."""
        return self.spent_before_s + self.now_s() - self.started_s

    def left_s(self) -> float:
        """Return the seconds that are left; negative when the limit is passed."""
        return self.limit_s - self.spent_s()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside, time counts for this stage. At the end it is kept, with all that was spent."""
        try:
            with self.part(name):
                yield
        finally:
            self.note()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, time counts for this stage, and is kept at its end."""
        watch = Stopwatch(self.now_s)
        try:
            with watch.part(name):
                yield
        finally:
            self.add(name, watch.seconds[name])

    def add(self, stage: str, seconds: float) -> None:
        """Keep that a stage took so many seconds more, and the most memory since the last one."""
        study = Study(self.store, self.study_id)
        watch = Stopwatch()
        watch.seconds |= study.stage_seconds()
        watch.add(stage, seconds)
        taken = self.memory.take() if self.memory else {}
        memory = study.stage_memory()
        before = memory.get(stage, {})
        most = {place: max(size, before.get(place, 0)) for place, size in taken.items()}
        if kept := {**before, **most}:
            memory[stage] = kept
        stages = {"seconds": watch.seconds, "memory_bytes": memory}
        self.store.put_reference(self.study_id, "stages", stages)
        sizes = [
            f", at most {size / 2**30:.3g} GiB on the {place}" for place, size in taken.items()
        ]
        _log.info("%s took %.3g s%s", stage, seconds, "".join(sizes))

    def is_filled(self) -> bool:
        """Check whether an earlier run came to the end and had at least this time."""
        return self.store.study(self.study_id).complete and self.spent_before_s >= self.limit_s

    def note(self) -> None:
        """Keep what was spent so far."""
        self.store.update_study(self.study_id, spent_s=self.spent_s())

    def finish(self) -> None:
        """Keep that the search is complete, and that it had at least the limit."""
        spent_s = max(self.spent_s(), self.limit_s)
        self.store.update_study(self.study_id, complete=True, spent_s=spent_s)
