import pytest

from autoquant.cli.values import duration_s, fraction, size_bytes
from autoquant.errors import WorkloadError


@pytest.mark.parametrize(
    ("text", "value"),
    [("1%", 0.01), ("0.5%", 0.005), ("0.01", 0.01), (" 2 % ", 0.02), ("150%", 1.5), ("0", 0.0)],
)
def test_percentages_and_fractions_mean_the_same(text, value):
    assert fraction(text, "--limit") == pytest.approx(value)


@pytest.mark.parametrize("text", ["-1%", "nan", "inf", "", "%", "one", "1%%", "5", "0.0_1", "٣%"])
def test_nonsense_percentages_are_refused_in_one_line(text):
    with pytest.raises(WorkloadError, match="--limit") as refused:
        fraction(text, "--limit")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2GiB", 2 * 2**30),
        ("500MB", 500_000_000),
        ("123456", 123456),
        ("1.5 kib", 1536),
        ("7B", 7),
        ("1TiB", 2**40),
    ],
)
def test_sizes_know_decimal_and_binary_units(text, value):
    assert size_bytes(text, "--max-memory") == value


@pytest.mark.parametrize("text", ["0", "-1GiB", "GiB", "2 GiBs", "nan", "", "0.2B", "٣"])
def test_nonsense_sizes_are_refused(text):
    with pytest.raises(WorkloadError, match="--max-memory"):
        size_bytes(text, "--max-memory")


@pytest.mark.parametrize(
    ("text", "value"),
    [("10m", 600), ("90s", 90), ("1h", 3600), ("600", 600), ("1h30m", 5400), ("0.5m", 30)],
)
def test_durations_know_their_units(text, value):
    assert duration_s(text, "--time-budget") == value


@pytest.mark.parametrize("text", ["0", "-5", "", "m", "10 minutes", "nan", "1m1h", "٣m"])
def test_nonsense_durations_are_refused(text):
    with pytest.raises(WorkloadError, match="--time-budget"):
        duration_s(text, "--time-budget")
