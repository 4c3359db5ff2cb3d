"""Short searches: fewer timing rounds, and a busy machine is not waited for. Also run as the `autoquant` command."""

from __future__ import annotations

import os

os.environ["AUTOQUANT_EAGER"] = "1"
if __name__ == "__main__":
    from autoquant.cli.main import hush_libraries

    hush_libraries()

import torch

from autoquant.profiler import clocks, roofline, timing
from autoquant.runtime import request, user_loop
from autoquant.study import delivered
from autoquant.tuner import driver
from autoquant.tuner.stages import refine

SHORTER = (
    (timing, "HIGHEST_OTHER_LOAD", 9.0),
    (request, "HIGHEST_OTHER_LOAD", 9.0),
    (timing, "_MAX_ROUNDS", 4),
    (roofline, "HIGHEST_OTHER_LOAD", 9.0),
    (roofline, "_PRODUCT_SIDE", {"cpu": 128, "cuda": 1024}),
    (clocks, "_HOST_SAMPLE_S", 2e-4),
    (request, "_ROUNDS", 3),
    (request, "_CALLS_PER_ROUND", 4),
    (refine, "SHORTEST_PROOF_S", 0.1),
    (user_loop, "_LONGEST_S", 0.5),
    (delivered, "is_faster", lambda _delivery: True),  # a tiny model gains nothing
)


CANDIDATES = ("int8-row/plain/int8pack-mm", "int8-row/plain/int-mm")


def shorten():
    """Make the searches of this process short, and single-threaded: small kernels are slow where threads wait for cores."""
    torch.set_num_threads(1)
    for module, name, value in SHORTER:
        assert hasattr(module, name), f"{module.__name__} has no {name} any more"
        setattr(module, name, value)


def search(model, text, db, budget_s=0.5, candidates=CANDIDATES, **options):
    """A short search by the loading that a user has."""
    shorten()
    return driver.search(
        str(model),
        eval_text=str(text),
        db=str(db),
        device="cpu",
        workload="prefill=8,decode=4",
        candidates=candidates,
        time_budget_s=budget_s,
        **options,
    )


def search_as_process(*arguments, **options):
    """`search` for a process of its own: what it returns is of no use there."""
    search(*arguments, **options)


if __name__ == "__main__":
    from autoquant.cli.main import run

    shorten()
    run()
