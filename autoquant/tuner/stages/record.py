"""The record stage: which linears the model runs, and which of them constraints are about."""

from __future__ import annotations

from collections.abc import Sequence

from autoquant.records import Recording, Site
from autoquant.solver.constraints import Bound
from autoquant.tuner.large import check_smallest
from autoquant.tuner.notices import constraint_notices, engine_notices
from autoquant.tuner.serving import bind_sites
from autoquant.tuner.setup import SearchSetup


def record_linears(setup: SearchSetup) -> Recording:
    """Return the linears and tables that the workload runs, from the store or recorded now."""
    settled = setup.settled
    known = setup.store.study(settled.study_id).recording
    if known is not None:
        return known
    recording = settled.record(setup.listener)
    check_smallest(settled, recording)
    setup.store.update_study(settled.study_id, recording=recording)
    return recording


def bind_constraints(setup: SearchSetup, sites: Sequence[Site]) -> Bound:
    """Find the layers that constraints are about, and report how many these are.

    Raises:
        ConstraintError: A pattern matches nothing, or constraints contradict one another.
    """
    request = setup.settled.request
    bound = bind_sites(setup.settled, sites)
    setup.tell(*constraint_notices(request.constraints, sites))
    if request.constraints.engine is not None:
        setup.tell(*engine_notices(request.constraints.engine, request.not_held, bound, sites))
    return bound
