"""The last stage that measures: at which m kernels change in the plans of the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autoquant.candidates import candidate_of
from autoquant.devices import backend
from autoquant.devices.memory import release_memory
from autoquant.events import Notice
from autoquant.profiler.crossovers import Measure, place_crossovers
from autoquant.profiler.prepare import workers_kept
from autoquant.profiler.timing_table import TimingTable
from autoquant.records import Measurement, Plan, TimingSubject
from autoquant.tuner.ledger import ProofLedger

_AT_LEAST = 0.5
"""The share of the last timings' seconds that further ones are expected to take at least."""


def crossovers_s(ledger: ProofLedger, device: str) -> float:
    """Return the seconds that the crossovers of one plan are expected to take, after profiling."""
    if not backend(device).settles_routes:
        return 0.0
    return _AT_LEAST * ledger.study.stage_seconds().get("profile", 0.0)


def measure_crossovers(
    ledger: ProofLedger, timings: TimingTable, measure: Measure, device: str
) -> None:
    """On GPUs, where a format has many kernels, measure where kernels overtake each other.

    The plan that would be recommended comes first, the rest of the front as time allows. At the m
    of the workload routes stay unchanged, and so do the proofs of the plans.
    """
    if not backend(device).settles_routes:
        return

    def can(subject: TimingSubject) -> bool:
        kind = torch.device(device).type
        return candidate_of(subject).unsupported_reason(subject.shape, subject.m, kind) is None

    pace = _Pace(ledger, timings, measure)
    left: list[Plan] = []
    with workers_kept():
        for plans in _by_worth(ledger):
            placed = place_crossovers(plans, timings, pace.measure, pace.has_time, can)
            for plan in placed.plans:
                ledger.put_plan(plan)
            left += [] if placed.complete else plans
    if left:
        names = ", ".join(plan.label for plan in left)
        text = (
            "not measured, for want of time: at which other numbers of rows kernels change in"
            f" {names}; a longer --time-budget does"
        )
        ledger.listener(Notice(text))
    release_memory()


def _by_worth(ledger: ProofLedger) -> list[list[Plan]]:
    """Return the plan that would be recommended, and the others of the front."""
    front = {row["plan_id"] for row in ledger.study.rows() if row["on_front"]}
    best = ledger.study.candidate()
    first = [ledger.plans[best.plan_id]] if best else []
    rest = [plan for plan_id, plan in ledger.plans.items() if plan_id in front]
    return [first, [plan for plan in rest if plan not in first]]


class _Pace:
    """Expects how long timings take, by how long those before them took.

    Candidates are prepared at the same time, so that few take nearly as long as many.
    """

    def __init__(self, ledger: ProofLedger, timings: TimingTable, measure: Measure) -> None:
        self._ledger, self._measure = ledger, measure
        self._count = len([m for m in timings.measurements.values() if m.outcome == "ok"])
        self._took_s = ledger.study.stage_seconds().get("profile", 0.0)

    def has_time(self, count: int) -> bool:
        """Check whether so many timings, and the delivery, fit into the time budget."""
        expected_s = self._took_s * max(count / max(self._count, 1), _AT_LEAST)
        return self._ledger.budget.left_s() >= self._ledger.least_s(0) + expected_s

    def measure(self, subjects: Sequence[TimingSubject]) -> Mapping[TimingSubject, Measurement]:
        """Time subjects, and learn how long that takes."""
        started_s = self._ledger.budget.now_s()
        found = self._measure(subjects)
        self._took_s = self._ledger.budget.now_s() - started_s
        self._count = len(subjects)
        return found
