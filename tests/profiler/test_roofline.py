"""The limits of a device: their arithmetic, and that they are never believed on a busy machine."""

from dataclasses import replace

import pytest

from autoquant.devices.cpu import CpuBackend
from autoquant.devices.effort import TimingEffort
from autoquant.events import Notice, StageFinished
from autoquant.profiler import roofline as module
from autoquant.profiler.floor import floor_us
from autoquant.profiler.roofline import measure_roofline, undisturbed_roofline
from autoquant.records import LinearShape, Roofline

ROOFLINE = Roofline(
    bandwidth_bytes_per_s=4e12,
    flops_per_s={"bfloat16": 8e14, "float32": 5e13, "int8": 1.6e15, "float8": 1.6e15},
)
SQUARE = LinearShape(n=4096, k=4096, bias=False, dtype="bfloat16")
BYTES = 2 * 4096 * 4096
SMALL = TimingEffort(largest_copy_bytes=1 << 20, largest_product=64)


def test_one_row_takes_as_long_as_reading_the_weight_and_moving_the_activations():
    # (33,554,432 + 1 * (4096 + 4096) * 2) bytes / 4e12 bytes/s
    assert floor_us(ROOFLINE, SQUARE, 1, BYTES, "bfloat16") == pytest.approx(8.392704)
    # a quarter of the weight; the activations stay
    assert floor_us(ROOFLINE, SQUARE, 1, BYTES / 4, "int8") == pytest.approx(2.101248)


def test_many_rows_take_as_long_as_their_products():
    # 2 * 2048 * 4096 * 4096 / 8e14 = 85.899 us; memory would take (33,554,432 + 33,554,432) / 4e12
    # = 16.8 us
    assert floor_us(ROOFLINE, SQUARE, 2048, BYTES, "bfloat16") == pytest.approx(85.89934592)
    assert floor_us(ROOFLINE, SQUARE, 2048, BYTES / 2, "float8") == pytest.approx(42.94967296)


def test_activations_count_in_the_dtype_of_the_shape():
    shape = LinearShape(n=2, k=6, bias=True, dtype="float32")
    slow = Roofline(bandwidth_bytes_per_s=1e6, flops_per_s={"float32": 1e12})
    assert floor_us(slow, shape, 3, 48, "float32") == pytest.approx(48 + 3 * (6 + 2) * 4)


def test_arithmetic_that_a_device_lacks_is_done_in_the_fastest_wider_one():
    old = Roofline(bandwidth_bytes_per_s=1e15, flops_per_s={"bfloat16": 1e12, "float32": 2e12})
    expected = 2 * 64 * 4096 * 4096 / 2e12 * 1e6
    for arithmetic in ("float8", "int8", "bfloat16", "float16", "float32"):
        assert floor_us(old, SQUARE, 64, BYTES, arithmetic) == pytest.approx(expected)
    memory_only = replace(old, flops_per_s={})
    assert floor_us(memory_only, SQUARE, 64, 1e9, "int8") == pytest.approx(
        (1e9 + 64 * 8192 * 2) / 1e9
    )


@pytest.fixture(autouse=True)
def shares(monkeypatch):
    """The shares of the machine that others use in the measurements to come; the last one stays."""
    left = [0.0]

    class Watch:
        def share(self):
            return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(CpuBackend, "watch_load", lambda _backend: Watch())
    return left


def measured(kept=None, events=None):
    """Measure with little effort."""
    return undisturbed_roofline(
        "cpu",
        cache_bytes=1,
        on_measured=([] if kept is None else kept).append,
        listener=([] if events is None else events).append,
        effort=SMALL,
    )


def test_a_cpu_has_a_bandwidth_and_rates_in_three_arithmetics():
    found = measure_roofline("cpu", effort=SMALL)
    assert 1e7 < found.bandwidth_bytes_per_s < 1e13
    assert set(found.flops_per_s) == {"bfloat16", "float32", "int8"}
    assert all(1e6 < rate < 1e15 for rate in found.flops_per_s.values())


def test_the_copy_does_not_fit_into_the_cache(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        module, "_copy_bytes_per_s", lambda size, _device: sizes.append(size) or 1.0
    )
    measure_roofline("cpu", effort=SMALL)
    measure_roofline("cpu", cache_bytes=1 << 21, effort=SMALL)
    assert sizes == [1 << 20, 1 << 22]


def test_bandwidth_counts_bytes_read_and_bytes_written(monkeypatch):
    monkeypatch.setattr(module, "_median_s", lambda _call, _device: 0.5)
    assert module._copy_bytes_per_s(4096, "cpu") == 2 * 4096 / 0.5
    assert module._flops_per_s("float32", 32, "cpu") == 2 * 32**3 / 0.5


def test_arithmetic_that_the_device_refuses_is_left_out(monkeypatch):
    def refuse(*_arguments, **_options):
        raise RuntimeError("not on this device")

    monkeypatch.setattr(module.torch, "_int_mm", refuse)
    assert set(measure_roofline("cpu", effort=SMALL).flops_per_s) == {"bfloat16", "float32"}


def test_what_was_measured_undisturbed_is_given_to_be_kept():
    kept, events = [], []
    found = measured(kept, events)
    assert kept == [found]
    assert isinstance(events[-1], StageFinished) and "GB/s" in events[-1].summary


def test_what_a_busy_machine_gave_is_used_with_a_notice_and_not_kept(shares):
    shares[:] = [0.5]
    kept, events = [], []
    assert measured(kept, events).bandwidth_bytes_per_s > 0
    assert any(isinstance(event, Notice) and "50% of the machine" in event.text for event in events)
    assert kept == []


def test_a_machine_that_becomes_quiet_is_believed(shares):
    shares[:] = [0.5, 0.0]
    kept, events = [], []
    assert measured(kept, events) in kept
    assert not any(isinstance(event, Notice) for event in events)
