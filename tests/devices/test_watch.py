"""What disturbs a measurement: others, heat, a limit on CPU time, a sleep."""

import time

import pytest

from autoquant.devices import watch
from autoquant.devices.watch import Watch, cpu_quota


class Quiet:
    def share(self):
        return 0.0


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose files and clocks a test sets; nothing disturbs at first."""
    heat = tmp_path / "cpus/cpu1/thermal_throttle"
    heat.mkdir(parents=True)
    (tmp_path / "group").mkdir()
    monkeypatch.setattr(watch, "_CPUS", tmp_path / "cpus")
    monkeypatch.setattr(watch, "_CGROUP", tmp_path / "group")
    clocks = {time.CLOCK_BOOTTIME: 500.0, time.CLOCK_MONOTONIC: 500.0}
    monkeypatch.setattr(watch.time, "clock_gettime", lambda clock: clocks[clock])
    monkeypatch.setattr(watch.time, "monotonic", lambda: clocks[time.CLOCK_MONOTONIC])

    def change(*, heat_count=0, held_back_s=0.0, slept_s=0.0, passed_s=0.0):
        (heat / "core_throttle_count").write_text(f"{heat_count}\n")
        text = f"usage_usec 5\nnr_throttled 3\nthrottled_usec {int(held_back_s * 1e6)}\n"
        (tmp_path / "group/cpu.stat").write_text(text)
        clocks[time.CLOCK_MONOTONIC] += passed_s
        clocks[time.CLOCK_BOOTTIME] += passed_s + slept_s

    change()
    return change


def test_nothing_disturbs_a_quiet_machine(machine):
    watching = Watch(Quiet())
    machine(passed_s=1)
    assert watching.disturbance(0.15) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slept_s": 90}, "the machine slept for 90 s"),
        ({"heat_count": 1}, "heat slowed the CPU down"),
        (
            {"held_back_s": 0.3},
            "the limit on CPU time held its threads back for 0.3 s",
        ),
    ],
    ids=["asleep", "hot", "held back"],
)
def test_a_disturbance_is_said(machine, change, words):
    watching = Watch(Quiet())
    machine(passed_s=1, **change)
    assert watching.disturbance(0.15) == words
    machine(**change)
    assert Watch(Quiet()).disturbance(0.15) == ""  # it was before


def test_a_short_wait_of_a_long_measurement_is_no_disturbance(machine):
    watching = Watch(Quiet())
    machine(passed_s=10, held_back_s=0.3)
    assert watching.disturbance(0.15) == ""


def test_others_disturb_above_a_share(machine):
    class Busy:
        def share(self):
            return 0.4

    assert Watch(Busy()).disturbance(0.15) == "others used 40% of the machine"
    assert Watch(Busy()).disturbance(0.5) == ""


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000", None), ("150000 100000", 1.5), ("?", None)]
)
def test_the_quota_of_a_container_is_read(machine, tmp_path, text, quota):
    (tmp_path / "group/cpu.max").write_text(text + "\n")
    assert cpu_quota() == quota


def test_a_machine_that_tells_nothing_is_quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "_CPUS", tmp_path / "none")
    monkeypatch.setattr(watch, "_CGROUP", tmp_path / "none")
    monkeypatch.delattr(watch.time, "CLOCK_BOOTTIME")
    assert Watch(Quiet()).disturbance(0.15) == "" and cpu_quota() is None
