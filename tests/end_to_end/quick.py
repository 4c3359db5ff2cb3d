"""Short searches: fewer timing rounds, and a busy machine is not waited for. Also run as the `autoquant` command."""

from __future__ import annotations

import os

os.environ["AUTOQUANT_EAGER"] = "1"
if __name__ == "__main__":
    from autoquant.cli.main import hush_libraries

    hush_libraries()

import torch

from autoquant.devices import effort
from autoquant.devices.effort import TimingEffort
from autoquant.study import delivered
from autoquant.tuner import driver, stages

LITTLE = TimingEffort(
    highest_other_load=9.0,
    linear_rounds=4,
    sample_s=2e-4,
    request_rounds=3,
    request_calls=4,
    loop_limit_s=0.5,
    largest_product=128,
)
SHORTER = (
    (effort, "_default", LITTLE),
    (stages, "_SHORTEST_PROOF_S", 0.1),
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
