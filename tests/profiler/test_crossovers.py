"""Where kernels overtake each other, found on made-up latencies."""

import pytest
import torch.nn.functional as F

from autoquant.candidates import A8_ROW, A16, Format, Kernel
from autoquant.profiler.crossovers import CLOSE_ENOUGH, FormatTimings, measure_crossovers
from autoquant.records import LinearShape, Measurement, TimingSubject

SHAPE = LinearShape(n=64, k=64, bias=False, dtype="bfloat16")
WORKING_SET = 1 << 20
KERNELS = (
    Kernel(id="few", numerics=A16, linear=F.linear),
    Kernel(id="many", numerics=A16, linear=F.linear),
    Kernel(id="dynamic", numerics=A8_ROW, linear=F.linear),
)
FORMAT = Format(id="own/plain", quantize=lambda w: w, dequantize=lambda s: s, kernels=KERNELS)
CANDIDATES = [(FORMAT, kernel) for kernel in KERNELS]


def subject(kernel, m):
    return TimingSubject(shape=SHAPE, m=m, format="own/plain", kernel=kernel, working_set_bytes=WORKING_SET)


def timed(kernel, m, latency_us):
    if latency_us is None:
        return Measurement(subject=subject(kernel, m), outcome="unsupported", reason="no")
    return Measurement(subject=subject(kernel, m), outcome="ok", samples_us=(latency_us,))


def latency_us(kernel, m):
    """`many` overtakes `few` behind m = 100; `dynamic` cannot be used up to 16 rows and is fastest from 33 on."""
    if kernel == "dynamic" and m <= 16:
        return None
    return {"few": float(m), "many": 100.5, "dynamic": 33.0}[kernel]


def measured(rows, asked=None):
    def measure(subjects):
        if asked is not None:
            asked.extend((s.kernel, s.m) for s in subjects)
        return {s: timed(s.kernel, s.m, latency_us(s.kernel, s.m)) for s in subjects}

    known = measure([subject(kernel.id, m) for kernel in KERNELS for m in rows])
    if asked is not None:
        asked.clear()
    return known | measure_crossovers([(SHAPE, m) for m in rows], CANDIDATES, known, WORKING_SET, measure)


@pytest.mark.parametrize(("pair", "true"), [(("few", "many"), 100), (("few", "dynamic"), 33)])
def test_a_crossover_is_found_to_within_a_factor_of_two(pair, true):
    timings = FormatTimings(SHAPE, "own/plain", WORKING_SET, measured([1, 2048]))
    low, high = timings.interval(1, 2048, *pair)
    assert low <= true <= high and high <= CLOSE_ENOUGH * low


def test_only_the_kernels_that_meet_are_measured_in_between_and_few_times():
    asked = []
    measured([1, 2048], asked)
    assert {kernel for kernel, _ in asked} == {"few", "many", "dynamic"}
    assert len(asked) == len(set(asked)) <= 2 * 2 * 4  # two crossovers, at most four halvings of 1 to 2048


def test_nothing_is_measured_where_no_kernel_changes():
    asked = []
    measured([1, 16], asked)
    assert asked == []


def test_neighbours_that_are_close_are_left_as_they_are():
    asked = []
    measured([90, 110], asked)
    assert asked == []


def test_the_fastest_kernel_is_one_of_the_allowed_numerics_that_was_timed():
    timings = FormatTimings(SHAPE, "own/plain", WORKING_SET, measured([8, 512]))
    assert timings.fastest(KERNELS, (A16, A8_ROW), 512) == "dynamic"
    assert timings.fastest(KERNELS, (A16,), 512) == "many"
    assert timings.fastest(KERNELS, (A16, A8_ROW), 8) == "few"
    assert timings.fastest(KERNELS, (A8_ROW,), 8) is None
