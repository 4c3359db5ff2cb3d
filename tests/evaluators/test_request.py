"""Timing a plan and the unquantized model in turn."""

import time

import pytest
import torch

from autoquant.evaluators import request
from autoquant.evaluators.request import RequestTimes, WrongResultError, time_requests, warm_up
from autoquant.records import Workload

WORKLOAD = Workload.parse("prefill=8,decode=4")


class Fake:
    """Phases that only wait, and note what is asked of them."""

    def __init__(self, name, log, seconds, limit=4, output=1.0):
        self.workload = WORKLOAD
        self._name, self._log, self._seconds, self._limit, self._output = name, log, seconds, limit, output
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

    monkeypatch.setattr(request, "OtherLoad", Watch)
    monkeypatch.setattr(request, "_ROUND_S", 0.01)
    return left


def pair(log):
    plan = Fake("plan", log, {"prefill": 1e-3, "decode": 0.0})
    return plan, Fake("original", log, {"prefill": 3e-3, "decode": 1e-3})


def test_both_models_are_timed_in_alternating_order(shares):
    log = []
    times = time_requests(*pair(log), "cpu")
    assert 0.9 < times.plan_ms["prefill"] < times.original_ms["prefill"] < 30
    assert times.plan_ms["decode"] < times.original_ms["decode"] and times.note == ""
    turns = [entry for i, entry in enumerate(log) if i == 0 or log[i - 1] != entry]
    first = [turns[i][0] for i in range(0, len(turns), 2)]
    assert {"plan", "original"} == set(first)
    assert [phase for _, phase in turns[:4]] == ["prefill", "prefill", "decode", "decode"]


def test_timing_is_repeated_while_the_machine_is_busy(shares):
    shares[:] = [0.8, 0.01]
    log = []
    assert time_requests(*pair(log), "cpu").note == ""
    assert shares == [0.01]


def test_a_machine_that_stays_busy_is_noted(shares, monkeypatch):
    monkeypatch.setattr(request, "_ATTEMPTS", 1)
    shares[:] = [0.3]
    assert "others used 30% of the machine" in time_requests(*pair([]), "cpu").note


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
