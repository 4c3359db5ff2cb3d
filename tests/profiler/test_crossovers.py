"""Where kernels overtake each other, found on made-up latencies."""

from dataclasses import replace

import pytest
import torch.nn.functional as F

from autoquant.candidates import A8_ROW, A16, Format, Kernel
from autoquant.profiler.crossovers import CLOSE_ENOUGH, place_crossovers
from autoquant.profiler.timing_table import TimingTable
from autoquant.records import (
    LayerChoice,
    LinearShape,
    Measurement,
    Plan,
    Prediction,
    RouteStep,
    TimingSubject,
)

SHAPE = LinearShape(n=64, k=64, bias=False, dtype="bfloat16")
WORKING_SET = 1 << 20
KERNELS = (
    Kernel(id="few", numerics=A16, linear=F.linear),
    Kernel(id="many", numerics=A16, linear=F.linear),
    Kernel(id="dynamic", numerics=A8_ROW, linear=F.linear),
)
FORMAT = Format(id="own/plain", quantize=lambda w: w, dequantize=lambda s: s, kernels=KERNELS)


def subject(kernel, m):
    return TimingSubject(
        shape=SHAPE, m=m, format="own/plain", kernel=kernel, working_set_bytes=WORKING_SET
    )


def timed(kernel, m, latency_us):
    if latency_us is None:
        return Measurement(subject=subject(kernel, m), outcome="unsupported", reason="no")
    return Measurement(subject=subject(kernel, m), outcome="ok", samples_us=(latency_us,))


def latency_us(kernel, m):
    """`many` overtakes `few` behind m = 100; `dynamic` cannot be used up to 16 rows and is fastest
    from 33 on.
    """
    if kernel == "dynamic" and m <= 16:
        return None
    return {"few": float(m), "many": 100.5, "dynamic": 33.0}[kernel]


def known_at(rows):
    return {
        s: timed(s.kernel, s.m, latency_us(s.kernel, s.m))
        for k in KERNELS
        for m in rows
        if (s := subject(k.id, m))
    }


def choice(*steps):
    route = tuple(RouteStep(upper_m=upper_m, kernel=kernel) for upper_m, kernel in steps)
    return LayerChoice(
        name="a",
        shape=SHAPE,
        format="own/plain",
        route=route,
        numerics="",
        latency_us={},
        memory_bytes=1,
        loss=0.0,
    )


def can(subject):
    return latency_us(subject.kernel, subject.m) is not None


def settle(rows, *steps, **options):
    """Where the route's kernels change once that was measured, and what was timed for it."""
    asked = []

    def measure(subjects):
        asked.extend((s.kernel, s.m) for s in subjects)
        return {s: timed(s.kernel, s.m, latency_us(s.kernel, s.m)) for s in subjects}

    plan = Plan(
        plan_id="p",
        study_id="s",
        label="l",
        kind="front",
        model_hash="h",
        dtype="bfloat16",
        layers=(choice(*steps), choice(*steps)),
        prediction=Prediction(request_ms=1.0, linear_ms=1.0, loss=0.0, memory_bytes=1),
    )
    table = TimingTable(WORKING_SET, known_at(rows))
    (found,) = place_crossovers([plan], table, measure, can=can, **options).plans
    route = found.layers[0].route
    assert found.layers[0] == found.layers[1] and replace(found, layers=plan.layers) == plan
    assert [step.kernel for step in route] == [kernel for _, kernel in steps] and route[
        -1
    ].upper_m is None
    return [step.upper_m for step in route[:-1]], asked


@pytest.mark.parametrize(("after", "true"), [("many", 100), ("dynamic", 33)])
def test_a_change_of_kernel_is_found_to_within_a_factor_of_two(after, true):
    (found,), _ = settle([1, 2048], (45, "few"), (None, after))
    assert true / CLOSE_ENOUGH <= found <= true * CLOSE_ENOUGH


def test_only_the_kernels_that_meet_are_measured_in_between_and_once():
    _, asked = settle([1, 2048], (45, "few"), (None, "many"))
    assert {kernel for kernel, _ in asked} == {"few", "many"}
    assert len(asked) == len(set(asked)) == 2 * 10  # the doublings between 1 and 2048


def test_where_one_kernel_cannot_be_used_the_other_is_not_timed():
    (found,), asked = settle([1, 64], (8, "few"), (None, "dynamic"))
    assert 32 <= found <= 64
    assert asked == [*(("dynamic", m) for m in (2, 4, 8, 16)), ("few", 32), ("dynamic", 32)]


def test_without_time_a_change_stays_in_the_middle_of_where_it_lies():
    _, asked = settle([1, 16], (4, "few"), (None, "many"), has_time=lambda _count: False)
    assert asked == []


def test_every_change_of_a_route_is_settled_between_the_rows_it_was_made_from():
    (first, second), asked = settle([1, 16, 2048], (4, "dynamic"), (181, "few"), (None, "many"))
    assert 1 <= first <= 16 and 100 / CLOSE_ENOUGH <= second <= 100 * CLOSE_ENOUGH
    assert {m for kernel, m in asked if kernel == "dynamic"} <= set(range(2, 16))


def test_nothing_is_measured_for_a_route_of_one_kernel():
    assert settle([1, 2048], (None, "many")) == ([], [])


def test_neighbours_that_are_close_are_left_as_they_are():
    assert settle([90, 110], (99, "few"), (None, "many")) == ([99], [])


def test_the_fastest_kernel_is_one_of_the_allowed_numerics_that_was_timed():
    timings = TimingTable(WORKING_SET, known_at([8, 512])).of(SHAPE, "own/plain")
    assert timings.fastest(KERNELS, (A16, A8_ROW), 512) == "dynamic"
    assert timings.fastest(KERNELS, (A16,), 512) == "many"
    assert timings.fastest(KERNELS, (A16, A8_ROW), 8) == "few"
    assert timings.fastest(KERNELS, (A8_ROW,), 8) is None
