"""The flow of a search. Every stage starts from what the store holds, and keeps what it learns."""

from __future__ import annotations

from dataclasses import replace

from autoquant.devices import backend
from autoquant.devices.memory import release_memory
from autoquant.errors import KernelError
from autoquant.study.study import Study
from autoquant.tuner.budget import Budget
from autoquant.tuner.deliver import Deliverer, deliver_best
from autoquant.tuner.distrust import distrust
from autoquant.tuner.ledger import ProofLedger
from autoquant.tuner.request import room_bytes
from autoquant.tuner.setup import SearchSetup
from autoquant.tuner.stages.crossovers import crossovers_s, measure_crossovers
from autoquant.tuner.stages.expect import announce
from autoquant.tuner.stages.kv_caches import proofs_of_kv_caches, prove_kv_caches
from autoquant.tuner.stages.profile import profile_linears, searchable
from autoquant.tuner.stages.prove import prove_front, prove_references
from autoquant.tuner.stages.record import bind_constraints, record_linears
from autoquant.tuner.stages.refine import refine
from autoquant.tuner.stages.score import score_choices


def run_stages(setup: SearchSetup, budget: Budget) -> None:
    """Search: record, profile, score, prove, refine; then deliver the best plan.

    A complete study that had at least this time goes straight to delivery.
    """
    if budget.is_filled():  # then nothing of the study changes, nor what it took
        setup.tell(
            f"study {setup.settled.study_id} is complete: the best of its plans within the limits,"
            f" nothing measured; {budget.spent_before_s:.0f} s were spent on it, and a larger"
            " --time-budget aims at these limits"
        )
        deliver(setup, setup.deliverer())
        return
    budget.add("load", budget.now_s() - budget.started_s)
    deliverer = setup.deliverer()
    try:
        search_plans(setup.for_this_machine(), budget, deliverer)
        budget.finish()
        with budget.part("deliver"):
            deliver(setup, deliverer)
    finally:
        deliverer.close()


def search_plans(setup: SearchSetup, budget: Budget, deliverer: Deliverer) -> None:
    """Run the stages that measure, again without a kernel that turned out wrong in a proof.

    What was measured before is in the store, so that little is done twice.

    Args:
        deliverer: Made ready while nothing is timed, since that takes a while; as the compiler is.
    """
    settled = setup.settled
    with budget.stage("record"):
        recording = record_linears(setup)
    bound = bind_constraints(setup, recording.layers)
    expected = announce(setup, recording, budget)
    runner = setup.start_runner()
    try:
        measure = setup.measurer(runner)
        while True:
            with budget.stage("profile"):
                timings = profile_linears(setup, recording, measure)
            recording = searchable(setup, recording, bound, timings)
            deliverer.make_ready()
            backend(setup.device).warm_compiler()
            with budget.stage("score"):
                space = score_choices(setup, recording, bound, timings, runner)
            ledger = ProofLedger(
                setup.store,
                settled.study_id,
                runner,
                budget,
                setup.listener,
                setup.reference,
                expected,
            )
            ledger.room_bytes = room_bytes(settled.loaded)
            try:
                with budget.stage("prove"):
                    referenced = prove_references(space, ledger, recording.layers, settled.limits)
                    prove_front(referenced, ledger, settled.limits)
                ledger.reserved_s = crossovers_s(ledger, setup.device)
                caches = proofs_of_kv_caches(settled.request.kv_cache, settled.loaded)
                ledger.reserved_s += caches * ledger.proof_s
                with budget.stage("refine"):
                    refine(referenced, ledger, settled.limits, settled.request.seed)
                ledger.reserved_s -= caches * ledger.proof_s
                if caches:
                    with budget.stage("kv cache"):
                        kinds = settled.request.kv_cache
                        prove_kv_caches(kinds, settled.loaded, ledger, settled.limits)
                break
            except KernelError as lie:
                ledger.drop_ahead()
                distrust(lie, timings, ledger, setup)
        with budget.stage("crossovers"):
            measure_crossovers(ledger, timings, measure, setup.device)
    finally:
        runner.close()
        release_memory()


def deliver(setup: SearchSetup, deliverer: Deliverer) -> None:
    """Recommend the best plan that is faster as its user will run it."""
    study_id = setup.settled.study_id
    study = Study(setup.store, study_id)
    deliver_best(study, replace(deliverer, calibration=study.calibration), setup.listener)
    best = study.recommended()
    setup.store.update_study(study_id, recommended=best.plan_id if best else None)
