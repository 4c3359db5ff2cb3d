"""Several workers as one runner: who gets which job, what comes back in which thread, and who is replaced."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest

from autoquant.errors import ProcessDiedError, WorkerLostError, WorkersError
from autoquant.tuner.workers.again import run_again
from autoquant.tuner.workers.asked import Workers
from autoquant.tuner.workers.crew import MOST_LOST, Crew, begin, count, drop, next_done
from autoquant.tuner.workers.in_process import InProcessRunner

from .made_up_jobs import Count, Fail


class Gate:
    """A job that tells its thread, and ends when it is let through."""

    def __init__(self, result, error=None):
        self.result, self.error = result, error
        self.began, self.open = threading.Event(), threading.Event()

    def run(self, bench, tell):
        tell(threading.current_thread())
        self.began.set()
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error
        return self.result


@contextmanager
def crew_of(workers, make=lambda: InProcessRunner(bench=None)):
    crew = Crew()
    for _ in range(workers):
        crew.join(make)
    crew.wait_for_all()
    try:
        yield crew
    finally:
        crew.close()


def ignore(_message):
    pass


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_as_many_jobs_run_at_a_time_as_there_are_workers():
    with crew_of(2) as crew:
        gates = [Gate(number) for number in range(3)]
        begun = [crew.begin(gate, ignore) for gate in gates]
        assert gates[0].began.wait(10) and gates[1].began.wait(10)
        assert not gates[2].began.wait(0.05)
        gates[1].open.set()
        assert next_done(begun) is begun[1]
        assert gates[2].began.wait(10)
        gates[0].open.set()
        gates[2].open.set()
        assert [each.result() for each in begun] == [0, 1, 2]


def test_messages_come_in_order_in_the_thread_that_waits():
    with crew_of(2) as crew:
        told = {0: [], 1: []}
        threads = set()

        def take(number, message):
            told[number].append(message)
            threads.add(threading.current_thread())

        begun = [crew.begin(Count(50), lambda m, n=number: take(n, m)) for number in told]
        assert threads == set()
        for each in begun:
            each.result()
        assert told == {0: list(range(50)), 1: list(range(50))}
        assert threads == {threading.current_thread()}


def test_what_a_job_raises_is_raised_where_its_result_is_asked_for():
    with crew_of(1) as crew:
        begun = [crew.begin(Fail("no luck"), ignore), crew.begin(Count(1), ignore)]
        begun[1].result()
        with pytest.raises(ValueError, match="no luck"):
            begun[0].result()


def test_a_job_that_is_wanted_now_comes_before_those_begun_ahead():
    with crew_of(1) as crew:
        order = []
        busy, ahead = Gate("busy"), Gate("ahead")
        begun = [
            crew.begin(each, lambda _m, e=each: order.append(e.result)) for each in (busy, ahead)
        ]
        assert busy.began.wait(10)
        wanted = Gate("wanted")
        now = crew.begin(wanted, lambda _m: order.append("wanted"), first=True)
        for gate in (busy, ahead, wanted):
            gate.open.set()
        begun[1].result()
        assert now.result() == "wanted" and order == ["busy", "wanted", "ahead"]


def test_a_dropped_job_is_not_run_if_it_still_waits_and_tells_nothing_if_it_runs():
    with crew_of(1) as crew:
        told = []
        busy, waiting = Gate("busy"), Gate("waiting")
        begun = [crew.begin(each, told.append) for each in (busy, waiting)]
        assert busy.began.wait(10)
        for each in begun:
            drop(crew, each)
        busy.open.set()
        crew.run(Count(1), ignore)
        assert told == [] and not waiting.began.is_set()


class Losing:
    """A runner whose worker is lost at the given jobs (counted over all runners)."""

    made, closed, runs = 0, 0, 0

    def __init__(self, lost_at=()):
        type(self).made += 1
        self._lost_at = lost_at

    def run(self, job, on_message):
        Losing.runs += 1
        if Losing.runs in self._lost_at:
            raise WorkerLostError("its machine is gone")
        return job.run(None, on_message)

    def close(self):
        Losing.closed += 1


@pytest.fixture
def losing():
    Losing.made = Losing.closed = Losing.runs = 0
    return Losing


def test_a_lost_worker_costs_its_job_and_is_replaced(losing):
    events = []
    with crew_of(1, lambda: losing(lost_at=(1, 2))) as crew:
        begun = crew.begin(Count(2), ignore)
        told = []
        run_again(crew, begun.job, told.append, events.append, begun)
        assert told == [0, 1] and losing.made == 3
        assert [event.text for event in events] == ["tried once more: its machine is gone"] * 2


def test_a_job_is_not_given_to_ever_more_workers(losing):
    with (
        crew_of(1, lambda: losing(lost_at=range(1, 99))) as crew,
        pytest.raises(WorkerLostError, match="gone"),
    ):
        run_again(crew, Count(1), ignore, ignore)
    assert losing.runs == MOST_LOST


def test_a_job_whose_own_process_dies_is_tried_once_more_only():
    gates = [Gate(None, ProcessDiedError("ended by SIGSEGV"))]
    gates[0].open.set()
    runs = []

    class Counting(InProcessRunner):
        def run(self, job, on_message):
            runs.append(job)
            return super().run(job, on_message)

    with (
        crew_of(2, lambda: Counting(None)) as crew,
        pytest.raises(ProcessDiedError, match="SIGSEGV"),
    ):
        run_again(crew, gates[0], ignore, ignore)
    assert len(runs) == 2


def test_a_worker_that_is_lost_while_it_starts_is_started_again(losing):
    starts = []

    def make():
        starts.append(1)
        if len(starts) < MOST_LOST:
            raise WorkerLostError("killed while it started")
        return losing()

    with crew_of(1, make) as crew:
        crew.run(Count(1), ignore)
    assert len(starts) == MOST_LOST


def test_when_the_last_worker_is_gone_that_is_an_error(losing):
    def make():
        if losing.made:
            raise WorkersError("no room")
        return losing(lost_at=(1,))

    with crew_of(1, make) as crew:
        lost = crew.begin(Count(1), ignore)
        further = crew.begin(Count(1), ignore)
        with pytest.raises(WorkerLostError):
            lost.result()
        with pytest.raises(WorkersError, match="no worker is left: no room"):
            further.result()


def test_a_worker_that_joins_late_takes_jobs():
    with crew_of(1) as crew:
        gates = [Gate(0), Gate(1)]
        begun = [crew.begin(gate, ignore) for gate in gates]
        assert not gates[1].began.wait(0.05)
        crew.join(lambda: InProcessRunner(bench=None))
        assert gates[1].began.wait(10) and count(crew) == 2
        for gate in gates:
            gate.open.set()
        assert [each.result() for each in begun] == [0, 1]


def test_if_one_cannot_be_made_all_are_closed(losing):
    made = threading.Event()

    def make():
        if made.is_set():
            raise WorkersError("no second place")
        made.set()
        return losing()

    with pytest.raises(WorkersError, match="no second place"), crew_of(2, make):
        pass
    wait_until(lambda: losing.closed == 1)


def test_a_runner_of_one_job_at_a_time_runs_it_when_its_result_is_asked_for():
    runner = InProcessRunner(bench=None)
    told = []
    first, second = (begin(runner, Count(until), told.append) for until in (1, 2))
    assert told == [] and count(runner) == 1
    second.result()
    first.result()
    assert told == [0, 1, 0]


@pytest.mark.parametrize("text", ["0", "-1", "two", "2.0", "", "ray:", "ray://", "http://x", "²"])
def test_workers_that_make_no_sense_are_refused(text):
    with pytest.raises(WorkersError, match="give a number of processes"):
        Workers.parse(text)


def test_without_ray_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr("autoquant.tuner.workers.asked.find_spec", lambda _name: None)
    with pytest.raises(
        WorkersError, match=r"--workers ray needs Ray: pip install 'autoquant\[ray\]'"
    ):
        Workers.parse("ray")


def test_an_address_of_ray_is_kept_as_it_is(monkeypatch):
    monkeypatch.setattr("autoquant.tuner.workers.asked.find_spec", lambda _name: object())
    assert Workers.parse("ray://head:10001") == Workers(None, "ray://head:10001")
    assert Workers.parse("ray") == Workers(None) and Workers.parse("3") == Workers(3)
