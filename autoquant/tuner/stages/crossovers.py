"""The last stage that measures: at which m kernels change in the plans of the front."""

from __future__ import annotations

from autoquant.devices import backend
from autoquant.devices.memory import release_memory
from autoquant.profiler.crossovers import Measure, place_crossovers
from autoquant.profiler.prepare import workers_kept
from autoquant.profiler.timing_table import TimingTable
from autoquant.tuner.ledger import ProofLedger


def measure_crossovers(
    ledger: ProofLedger, timings: TimingTable, measure: Measure, device: str
) -> None:
    """On GPUs, where a format has many kernels, measure where kernels overtake each other.

    At the m of the workload routes stay unchanged, and so do the proofs of the plans.
    """
    if not backend(device).settles_routes:
        return
    front = {row["plan_id"] for row in ledger.study.rows() if row["on_front"]}
    plans = [plan for plan_id, plan in ledger.plans.items() if plan_id in front]
    with workers_kept():  # each halving would wait for new ones otherwise
        placed = place_crossovers(plans, timings, measure)
    for plan in placed:
        ledger.put_plan(plan)
    release_memory()
