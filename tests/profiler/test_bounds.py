"""What needs no timing: floors worked out by hand, against what was tried out."""

import pytest

from autoquant.candidates import get_format
from autoquant.profiler.bounds import Tried, beaten, bounded, least_us
from autoquant.records import LinearShape, Roofline, TimingSubject

SHAPE = LinearShape(n=1000, k=2000, bias=False, dtype="bfloat16")
ROOFLINE = Roofline(bandwidth_bytes_per_s=1e12, flops_per_s={"bfloat16": 1e14, "int8": 2e14})
HEADROOM = 1.15


def subject(kernel, m=1, fmt="int8-row/plain", shape=SHAPE):
    return TimingSubject(shape=shape, m=m, format=fmt, kernel=kernel, working_set_bytes=1 << 20)


def kernel(kernel_id):
    return get_format("int8-row/plain").kernel(kernel_id)


def test_a_kernel_reads_its_weight_and_activations_once():
    moved = 2_000_000 + 2 * (1000 + 2000)
    assert least_us(kernel("gemlite"), SHAPE, 1, 2_000_000, ROOFLINE) == pytest.approx(
        moved / 1e6 / HEADROOM
    )


def test_a_kernel_that_materializes_its_weight_also_writes_and_reads_it_at_the_speed_of_the_cache():
    moved = 2_000_000 + 2 * (1000 + 2000) + 2 * 4_000_000 / 2
    assert least_us(kernel("dequantize-matmul"), SHAPE, 1, 2_000_000, ROOFLINE) == pytest.approx(
        moved / 1e6 / HEADROOM
    )


def test_many_rows_take_the_time_of_their_products():
    flops = 2 * 4096 * 1000 * 2000
    assert least_us(kernel("gemlite"), SHAPE, 4096, 2_000_000, ROOFLINE) == pytest.approx(
        flops / 1e14 * 1e6 / HEADROOM
    )
    assert least_us(kernel("int-mm"), SHAPE, 4096, 2_000_000, ROOFLINE) == pytest.approx(
        flops / 2e14 * 1e6 / HEADROOM
    )


def test_a_kernel_is_bounded_away_by_a_faster_one_of_its_format_that_is_no_less_exact():
    tried = {subject("gemlite"): Tried(3.0, 2_000_000)}  # dequantize-matmul takes at least 5.2
    found = bounded([subject("dequantize-matmul"), subject("int-mm")], tried, ROOFLINE)
    assert list(found) == [subject("dequantize-matmul")]
    measurement = found[subject("dequantize-matmul")]
    assert (measurement.outcome, measurement.samples_us) == ("bounded", ())
    assert measurement.reason == "takes at least 5.2 us by the roofline; gemlite took 3.0"


@pytest.mark.parametrize(
    "other",
    [
        subject("gemlite-dynamic"),  # rounds the activation
        subject("gemlite", m=2),
        subject("gemlite", fmt="float8-row/plain"),
        subject("gemlite", shape=LinearShape(n=8, k=8, bias=False, dtype="bfloat16")),
    ],
    ids=["less exact", "another m", "another format", "another shape"],
)
def test_what_is_no_rival_bounds_nothing(other):
    assert bounded([subject("dequantize-matmul")], {other: Tried(0.1, 2_000_000)}, ROOFLINE) == {}


def test_a_kernel_that_could_still_win_is_not_bounded_away():
    tried = {subject("gemlite"): Tried(5.3, 2_000_000)}
    assert bounded([subject("dequantize-matmul")], tried, ROOFLINE) == {}


def test_only_those_far_behind_a_rival_are_beaten():
    tried = {
        subject("gemlite"): Tried(4.0, 1),
        subject("dequantize-matmul"): Tried(10.1, 1),
        subject("gemlite-dynamic"): Tried(9.9, 1),
        subject("int-mm"): Tried(11.0, 1),
        subject("int8pack-mm", m=2): Tried(99.0, 1),
    }
    found = beaten(tried, tried)
    assert set(found) == {subject("dequantize-matmul"), subject("int-mm")}
    assert found[subject("int-mm")].outcome == "beaten"
    assert found[subject("int-mm")].reason == "took 11.0 us when tried out; gemlite took 4.0"


def test_the_fastest_is_never_beaten_even_where_the_less_exact_is_faster():
    tried = {subject("gemlite"): Tried(40.0, 1), subject("gemlite-dynamic"): Tried(4.0, 1)}
    assert beaten(tried, tried) == {}
