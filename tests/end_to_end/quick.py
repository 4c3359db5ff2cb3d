"""Short searches: fewer timing rounds, and a busy machine is not waited for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from autoquant.devices import effort
from autoquant.devices.base import Paces
from autoquant.devices.cpu import CpuBackend
from autoquant.devices.effort import TimingEffort
from autoquant.profiler import entrant, timing
from autoquant.runtime import request
from autoquant.solver import front
from autoquant.study import delivered
from autoquant.tuner import driver, ledger
from autoquant.tuner import prove as proving
from autoquant.tuner.stages import prove

LITTLE = TimingEffort(
    highest_other_load=9.0,
    linear_warm_up_s=0.0,
    linear_rounds=4,
    sample_s=2e-4,
    request_rounds=3,
    request_calls=2,
    loop_limit_s=0.1,
    largest_copy_bytes=1 << 20,
    largest_product=64,
)


def time_requests(plan, original, device, effort=None):
    """Time as a search does, with an unquantized model that is four times as slow.

    Tiny models differ by noise alone, and a search recommends nothing where nothing is faster.
    """
    times = request.time_requests(plan, original, device, effort)
    plan_ms = _slower(times.plan_ms) if plan is original else times.plan_ms
    rounds = tuple((of_plan, _slower(of_original)) for of_plan, of_original in times.rounds)
    original_ms = _slower(times.original_ms)
    return replace(times, plan_ms=plan_ms, original_ms=original_ms, rounds=rounds)


def _slower(phases):
    return {name: 4 * ms for name, ms in phases.items()}


def not_traced(compute, *, tracing_mode):
    """In place of `make_fx`: without a compiler to trace for, a kernel gives the same untraced.

    Tracing is nine tenths of the time of a tiny linear's timing; tests/profiler traces.
    """
    return lambda _example: compute


_sample = timing._sample


def sample_linear(timed):
    """Time as a search does, with unquantized linears that are four times as slow.

    Tiny linears differ by the host's overhead alone, which favours those that are not quantized.
    """
    _sample(timed)
    if timed.subject.format in UNQUANTIZED and not timed.failure:
        timed.samples_us[-1] *= 4


def prove_anyway(ledger, plan, *, before=0):
    """Leave nothing out: the time budgets of tests end their refinement only."""
    ledger.prove(plan)
    return True


NO_TIME = Paces(
    timing_s=0.0,
    score_s=0.0,
    proof_s=0.1,
    proof_linear_s=0.0,
    deliver_s=0.2,
    deliver_linear_s=0.0,
)
UNQUANTIZED = ("bfloat16/plain", "float16/plain", "float32/plain")
SHORTER = (
    (timing, "_sample", sample_linear),
    (entrant, "make_fx", not_traced),
    (proving, "time_requests", time_requests),
    (effort, "_default", LITTLE),
    (entrant, "linears_a_call", lambda _m: 2),
    (CpuBackend, "paces", NO_TIME),
    (ledger.ProofLedger, "prove_if_time", prove_anyway),
    (delivered, "is_faster", lambda _delivery: True),  # a tiny model gains nothing
)
FEWER_PLANS = (
    (prove, "LEAST_PLANS", 4),
    (prove, "FRONT_PLANS", 2),
    (front, "LOSS_BUDGETS", 6),
)  # not where a whole search is asked for

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


def search(
    model,
    text,
    db,
    budget_s=0.5,
    candidates=CANDIDATES,
    workload="prefill=8,decode=4",
    **options,
):
    """A short search by the loading that a user has."""
    return driver.search(
        str(model),
        eval_text=str(text),
        db=str(db),
        device="cpu",
        workload=workload,
        candidates=candidates,
        time_budget_s=budget_s,
        **options,
    )


def search_as_process(*arguments, **options):
    """`search` for a process of its own: what it returns is of no use there."""
    gc.freeze()  # as in tests/conftest.py
    with short():
        search(*arguments, **options)
