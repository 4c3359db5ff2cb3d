"""Timing a plan and the unquantized model in turn."""

import time
from dataclasses import replace

import pytest
import torch

from autoquant.devices.cpu import CpuBackend
from autoquant.devices.effort import TimingEffort
from autoquant.records import Workload
from autoquant.runtime.request import (
    RequestTimes,
    WrongResultError,
    make_warm,
    time_in_turn,
    time_requests,
    warm_up,
)

WORKLOAD = Workload.parse("prefill=8,decode=4")
SHORT = TimingEffort(request_round_s=0.01)


class Fake:
    """Phases that only wait, and note what is asked of them."""

    def __init__(self, name, log, seconds, limit=4, output=1.0):
        self.workload = WORKLOAD
        self._name, self._log, self._seconds, self._limit, self._output = (
            name,
            log,
            seconds,
            limit,
            output,
        )
        self._left = 0

    def reset(self, phase):
        self._left = self.limit(phase)

    def run(self, phase):
        assert self._left > 0, "more calls than a reset allows"
        self._left -= 1
        self._log.append((self._name, phase))
        time.sleep(self._seconds[phase])
        return torch.full((1, 4), self._output)

    def run_eager(self, phase):
        assert self._left > 0
        self._left -= 1
        return torch.ones(1, 4)

    def limit(self, phase):
        return self._limit if phase == "decode" else 1


@pytest.fixture
def shares(monkeypatch):
    """How busy others keep the machine in the attempts to come; the last share stays."""
    left = [0.0]

    class Watch:
        def share(self):
            return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(CpuBackend, "watch_load", lambda _backend: Watch())
    return left


def pair(log):
    plan = Fake("plan", log, {"prefill": 1e-3, "decode": 0.0})
    return plan, Fake("original", log, {"prefill": 3e-3, "decode": 1e-3})


def test_both_models_are_timed_in_alternating_order(shares):
    log = []
    times = time_requests(*pair(log), "cpu", SHORT)
    assert 0.9 < times.plan_ms["prefill"] < times.original_ms["prefill"] < 30
    assert times.plan_ms["decode"] < times.original_ms["decode"] and times.note == ""
    turns = [entry for i, entry in enumerate(log) if i == 0 or log[i - 1] != entry]
    first = [turns[i][0] for i in range(0, len(turns), 2)]
    assert {"plan", "original"} == set(first)
    assert [phase for _, phase in turns[:4]] == ["prefill", "prefill", "decode", "decode"]


def test_timing_is_repeated_while_the_machine_is_busy(shares):
    shares[:] = [0.8, 0.01]
    log = []
    assert time_requests(*pair(log), "cpu", SHORT).note == ""
    assert shares == [0.01]


def test_a_machine_that_stays_busy_is_noted(shares):
    shares[:] = [0.3]
    once = replace(SHORT, attempts=1)
    assert "others used 30% of the machine" in time_requests(*pair([]), "cpu", once).note


def test_a_slow_reset_takes_no_calls_from_a_sample(shares):
    class SlowToReset(Fake):
        def reset(self, phase):
            super().reset(phase)
            time.sleep(0.02)

    counts = []
    for kind in (Fake, SlowToReset):
        log = []
        model = kind("plan", log, {"prefill": 1e-3, "decode": 1e-3}, limit=20)
        effort = replace(SHORT, request_calls=5, request_round_s=1.0, request_rounds=2)
        time_in_turn([model], "cpu", effort)
        counts.append(log.count(("plan", "decode")))
    assert counts == [12, 12]  # two rounds of five, each behind one that does not count


def test_the_first_of_several_calls_does_not_count(shares):
    class Settling(Fake):
        def reset(self, phase):
            super().reset(phase)
            self._seconds = {"prefill": 1e-3, "decode": 0.05}

        def run(self, phase):
            found = super().run(phase)
            self._seconds = {"prefill": 1e-3, "decode": 1e-3}
            return found

    (taken,), _ = time_in_turn([Settling("plan", [], {}, limit=20)], "cpu", SHORT)
    assert taken["decode"] < 20


def test_a_request_is_the_sum_of_calls_times_latency():
    times = RequestTimes({"prefill": 10.0, "decode": 1.5}, {"prefill": 8.0, "decode": 3.0})
    assert times.request_ms({"prefill": 1, "decode": 4}) == (16.0, 20.0)


def test_every_phase_is_warmed_up():
    log = []
    warm_up(Fake("plan", log, {"prefill": 0.0, "decode": 0.0}))
    assert log.count(("plan", "prefill")) >= 2 and log.count(("plan", "decode")) >= 2


@pytest.mark.parametrize("output", [1.3, 0.0, float("nan")])
def test_a_compiled_phase_that_computes_something_else_is_refused(output):
    with pytest.raises(WrongResultError, match="compiled prefill is off"):
        warm_up(Fake("plan", [], {"prefill": 0.0, "decode": 0.0}, output=output))


def test_a_compiled_phase_may_differ_by_rounding():
    warm_up(Fake("plan", [], {"prefill": 0.0, "decode": 0.0}, output=1.02))


def test_every_model_begins_a_round(shares):
    log = []
    models = [
        Fake(name, log, {"prefill": 1e-3 * number, "decode": 0.0})
        for number, name in enumerate("abc", 1)
    ]
    times, note = time_in_turn(models, "cpu", replace(SHORT, request_rounds=3))
    assert note == "" and [round(each["prefill"]) for each in times] == sorted(
        round(each["prefill"]) for each in times
    )
    prefills = [
        name
        for i, (name, phase) in enumerate(log)
        if phase == "prefill" and (i == 0 or log[i - 1] != log[i])
    ]
    assert prefills == list("abcbcacab")


DIVISIONS = ("parts", "regions", "whole")


def test_a_model_is_compiled_in_the_first_way_that_works():
    phases, note = make_warm(
        lambda division: Fake(division, [], {"prefill": 0.0, "decode": 0.0}), DIVISIONS
    )
    assert phases._name == "parts" and note == ""


@pytest.mark.parametrize("output", [0.0, RuntimeError("the compiler gave up\nin many words")])
@pytest.mark.parametrize(
    ("works", "said"),
    [("regions", "in one piece, not part by part"), ("whole", "whole, not block")],
)
def test_a_model_that_does_not_compile_in_one_way_is_compiled_in_the_next_with_a_note(
    output, works, said
):
    def make(division):
        fails = DIVISIONS.index(division) < DIVISIONS.index(works)
        if fails and isinstance(output, Exception):
            raise output
        return Fake(division, [], {"prefill": 0.0, "decode": 0.0}, output=output if fails else 1.0)

    phases, note = make_warm(make, DIVISIONS)
    assert phases._name == works and note.startswith(f"compiled {said}")
    assert "\n" not in note and ("gave up" in note or "off by" in note)


def test_a_model_that_is_wrong_either_way_is_refused():
    with pytest.raises(WrongResultError):
        make_warm(
            lambda division: Fake("plan", [], {"prefill": 0.0, "decode": 0.0}, output=0.0),
            DIVISIONS,
        )
