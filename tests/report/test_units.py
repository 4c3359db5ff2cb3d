import math

import pytest

from autoquant.report import units


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(0.5, "0.500 µs"), (850, "850 µs"), (1234, "1.23 ms"), (2.5e6, "2.50 s"), (0, "0 µs")],
)
def test_durations_take_the_unit_that_suits_them(microseconds, text):
    assert units.duration_us(microseconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (512, "512 B"),
        (2048, "2.00 KiB"),
        (2**25, "32.0 MiB"),
        (2**31, "2048 MiB"),
        (20 * 2**30, "20.0 GiB"),
    ],
)
def test_sizes_are_mib_up_to_ten_gib(value, text):
    assert units.size(value) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0042, "+0.42%"),
        (-0.0001, "-0.01%"),
        (1.5, "+150.0%"),
        (42.0, "+4200%"),
        (math.inf, "inf"),
    ],
)
def test_percentages_keep_the_decimals_that_matter(fraction, text):
    assert units.percent(fraction, signed=True) == text


def test_a_column_of_times_has_one_unit_and_aligned_decimals():
    assert units.common_ms([1.5, 120.0]) == ("ms", ["1.50", "120.00"])
    assert units.common_ms([0.08, 0.9]) == ("µs", ["80.0", "900.0"])
    assert units.common_ms([]) == ("ms", [])


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (200, "3m 20s"), (3900, "1h 05m")])
def test_time_left_is_short(seconds, text):
    assert units.clock_s(seconds) == text
