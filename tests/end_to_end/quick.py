"""Short searches: fewer timing rounds, and a busy machine is not waited for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from autoquant.evaluators import request, user_loop
from autoquant.profiler import clocks, roofline, timing
from autoquant.tuner import delivered, driver, stages

SHORTER = (
    (timing, "HIGHEST_OTHER_LOAD", 9.0),
    (request, "HIGHEST_OTHER_LOAD", 9.0),
    (timing, "_MAX_ROUNDS", 4),
    (timing, "_unroll", lambda _m: 2),
    (roofline, "HIGHEST_OTHER_LOAD", 9.0),
    (roofline, "_COPY_BYTES", {"cpu": 1 << 20, "cuda": 1 << 28}),
    (roofline, "_PRODUCT_SIDE", {"cpu": 64, "cuda": 1024}),
    (clocks, "_HOST_SAMPLE_S", 2e-4),
    (request, "_ROUNDS", 3),
    (request, "_CALLS_PER_ROUND", 4),
    (stages, "_SHORTEST_PROOF_S", 0.1),
    (user_loop, "_LONGEST_S", 0.5),
    (delivered, "is_faster", lambda _delivery: True),  # a tiny model gains nothing
)
FEWER_PLANS = ((stages, "LEAST_PLANS", 4), (stages, "FRONT_PLANS", 2))  # not where a whole search is asked for

CANDIDATES = ("int8-row/plain/int8pack-mm", "int8-row/plain/int-mm")


@contextmanager
def short(settings=(*SHORTER, *FEWER_PLANS)) -> Iterator[None]:
    """Inside, searches in this process are short, run nothing in another process, and compile nothing.

    They compute in one thread, as small kernels are slow where threads wait for cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module, name, value in settings:
                patch.setattr(module, name, value)
            patch.setenv("AUTOQUANT_EAGER", "1")
            patch.setenv("AUTOQUANT_IN_PROCESS", "1")
            yield
    finally:
        torch.set_num_threads(threads)


def search(model, text, db, budget_s=0.5, candidates=CANDIDATES, **options):
    """A short search by the loading that a user has."""
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
    gc.freeze()  # as in tests/conftest.py
    with short():
        search(*arguments, **options)
