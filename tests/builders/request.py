"""The request of a search in which the user left open all that can be left open."""

from __future__ import annotations

from autoquant.solver.constraints import Constraints
from autoquant.solver.limits import Limits
from autoquant.tuner.judge import Asked
from autoquant.tuner.request import SearchRequest


def make_request(model, db, **changes):
    values = {
        "asked": Asked(None, None, None),
        "candidates": [],
        "workload": None,
        "batch": 1,
        "limits": Limits(),
        "constraints": Constraints(),
        "sensitivity": None,
        "fuse": False,
        "time_budget_s": 1.0,
        "seed": 0,
    }
    return SearchRequest(model=model, db=db, **(values | changes))
