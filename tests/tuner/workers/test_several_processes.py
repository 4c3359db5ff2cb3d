"""Several worker processes of one host: each with cores of its own, replaced when somebody ends it."""

from __future__ import annotations

import os
import random
import signal
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import ClassVar

import pytest
import torch
from end_to_end.tiny import save_llama

from autoquant.errors import ProcessDiedError, WorkerLostError, WorkersError
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.text import TextParts
from autoquant.events import Notice
from autoquant.models import from_module, load_model
from autoquant.records import Workload
from autoquant.tuner.workers.again import run_again
from autoquant.tuner.workers.asked import Workers
from autoquant.tuner.workers.crew import count
from autoquant.tuner.workers.forking import DONE, RAISED, TOLD, receive
from autoquant.tuner.workers.jobs import Bench
from autoquant.tuner.workers.start import IN_PROCESS_VARIABLE, places_for, start_runner
from autoquant.tuner.workers.worker import _serve

from .made_up_jobs import Count, Fail, Sleep

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="jobs run in this process elsewhere"),
]
FORMATS = ("bfloat16/plain", "int8-row/plain")


@dataclass(frozen=True)
class Where:
    """Gives the cores of its process, and how many threads it computes with."""

    needs_model: ClassVar[bool] = True
    keeps_process: ClassVar[bool] = False
    silence_s: ClassVar[float | None] = None

    def run(self, bench, tell):
        tell(os.getppid())  # the worker
        return os.sched_getaffinity(0), torch.get_num_threads()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    loaded = load_model(save_llama(tmp_path_factory.mktemp("several") / "model"))
    parts = {
        part: torch.zeros(2, 20, dtype=torch.int64)
        for part in ("calibration", "selection", "report")
    }
    quality = TextQuality(TextParts(parts), "cpu")
    workload = Workload.parse("prefill=4,decode=2")
    return Bench(
        load=lambda: loaded, quality=quality, workload=workload, device="cpu", execution="eager"
    )


@pytest.fixture(scope="module")
def crew(bench):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if len(os.sched_getaffinity(0)) < 2:
            pytest.skip("two workers need two cores")
        crew = start_runner(bench, FORMATS, lambda _event: None, Workers(2))
    finally:
        torch.set_num_threads(before)
    yield crew
    crew.close()


def test_each_worker_has_cores_of_its_own_and_the_threads_of_the_search(crew):
    workers, found = {0: [], 1: []}, []
    begun = [crew.begin(Where(), workers[0].append), crew.begin(Where(), workers[1].append)]
    found = [each.result() for each in begun]
    assert count(crew) == 2 and workers[0] != workers[1]
    assert [threads for _, threads in found] == [1, 1]
    assert [len(cores) for cores, _ in found] == [1, 1] and found[0] != found[1]


def test_workers_that_somebody_ends_at_any_moment_cost_no_job(crew):
    events, counted = [], []
    rng = random.Random(3)
    jobs = [Count(200) for _ in range(6)]
    told = [[] for _ in jobs]

    def take(number, message):
        told[number].append(message)
        if message == 100 and len(counted) < 3 and rng.random() < 0.9:
            counted.append(number)
            for runner in list(crew._runners)[:1]:
                os.kill(runner._process.pid, signal.SIGKILL)

    takers = [lambda message, n=number: take(n, message) for number in range(len(jobs))]
    begun = [crew.begin(job, taker) for job, taker in zip(jobs, takers, strict=True)]
    for job, taker, each in zip(jobs, takers, begun, strict=True):
        assert run_again(crew, job, taker, events.append, each)[1] == 1
    assert counted and all(messages[-200:] == list(range(200)) for messages in told)
    assert all(isinstance(event, Notice) and "from outside" in event.text for event in events)
    crew.run(Count(1), lambda _message: None)


def test_a_worker_that_crashes_by_itself_is_told_from_one_that_somebody_ended(crew):
    def crash(process):
        os.kill(os.getpgid(process), signal.SIGSEGV)  # the job's worker leads its session

    with pytest.raises(ProcessDiedError, match="SIGSEGV") as caught:
        crew.run(Sleep(), crash)
    assert not isinstance(caught.value, WorkerLostError)
    assert crew.run(Count(1), lambda _message: None)[1] == 1


def test_a_process_that_cannot_be_forked_does_jobs_itself():
    ours, theirs = Pipe()
    with ours, theirs:
        _serve(Count(2), None, theirs)
        _serve(Fail("no luck"), None, theirs)
        _serve(Fail(""), None, theirs)  # an error that cannot be sent
        told = [receive(ours) for _ in range(5)]
    assert told[:2] == [(TOLD, 0), (TOLD, 1)] and told[2] == (
        DONE,
        (os.getpid(), torch.get_num_threads()),
    )
    assert [kind for kind, _ in told[3:]] == [RAISED, RAISED]
    assert isinstance(told[3][1], ValueError) and "OddError" in str(told[4][1])


def test_more_workers_than_there_are_cores_for_are_refused_with_what_to_do(bench):
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(
        WorkersError, match="set OMP_NUM_THREADS to the threads that one should have"
    ):
        places_for(cores + 1, "cpu")
    assert len(places_for(1, "cpu")) == 1


def test_workers_that_cannot_have_the_same_model_are_refused(bench, monkeypatch):
    live = from_module(torch.nn.Linear(4, 4))
    other = Bench(
        load=lambda: live,
        quality=bench.quality,
        workload=bench.workload,
        device="cpu",
        execution="eager",
    )
    with pytest.raises(WorkersError, match="the model is a live module"):
        start_runner(other, FORMATS, lambda _event: None, Workers(1))
    monkeypatch.setenv(IN_PROCESS_VARIABLE, "1")
    with pytest.raises(WorkersError, match=IN_PROCESS_VARIABLE):
        start_runner(bench, FORMATS, lambda _event: None, Workers(1))


def test_an_interrupt_ends_all_workers(bench):
    from .test_runners import is_running, wait_until

    crew = start_runner(bench, FORMATS, lambda _event: None, Workers(1))
    processes = []

    def interrupt(message):
        processes.append(message)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crew.run(Sleep(), interrupt)
    crew.close()
    wait_until(lambda: not is_running(processes[0]))
