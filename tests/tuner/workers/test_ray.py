"""Actors of Ray as workers: placed by device, replaced when they or their node are gone, taken in when they join.

Ray is no dependency of the tests: `pip install 'autoquant[ray]'` lets these run.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
from end_to_end.tiny import save_llama

from autoquant.devices import backend
from autoquant.errors import ProcessDiedError, WorkersError
from autoquant.evaluators.text import TextParts
from autoquant.models import SameModel, load_model
from autoquant.records import Workload
from autoquant.tuner.workers.again import run_again
from autoquant.tuner.workers.jobs import BenchSpec

from .made_up_jobs import Count, Crash, Fail
from .test_several_processes import Where

ray = pytest.importorskip("ray")
ray_runner = pytest.importorskip("autoquant.tuner.workers.ray_runner")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="jobs run in this process elsewhere"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
HARDWARE = backend("cpu").fingerprint()
RESOURCE = ray_runner.resource_of(HARDWARE)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    loaded = load_model(save_llama(tmp_path_factory.mktemp("ray") / "model"))
    parts = {
        part: torch.zeros(2, 20, dtype=torch.int64)
        for part in ("calibration", "selection", "report")
    }
    return BenchSpec(
        model=SameModel.of(loaded),
        judged_on=TextParts(parts),
        workload=Workload.parse("prefill=4,decode=2"),
        device="cpu",
        execution="eager",
        formats=("bfloat16/plain",),
        threads=1,
    )


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    # Of the nodes: they look for places as the search does, and import its jobs.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    del os.environ["OMP_NUM_THREADS"]


@pytest.fixture(scope="class")
def here(spec, one_thread):
    crew = ray_runner.ray_crew(spec, HARDWARE, "")
    yield crew
    crew.close()


def ignore(_message):
    pass


def wait_until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class TestHere:
    def test_without_an_address_there_is_an_actor_for_each_place_of_this_host(self, here):
        assert here.workers == len(backend("cpu").places()) > 1
        begun = [here.begin(Where(), ignore) for _ in range(here.workers)]
        cores = [each.result()[0] for each in begun]
        assert sum(map(len, cores)) == len(set().union(*cores)) == here.workers

    def test_what_a_job_tells_and_raises_comes_back(self, here):
        told = []
        assert here.run(Count(100), told.append)[1] == 1
        assert told == list(range(100))
        with pytest.raises(ValueError, match="no luck"):
            here.run(Fail("no luck"), ignore)
        with pytest.raises(ProcessDiedError, match="SIGSEGV"):
            here.run(Crash(signal.SIGSEGV), ignore)

    def test_an_actor_that_is_killed_costs_its_job_and_is_replaced(self, here):
        killed, told = [], []

        def kill(message):
            told.append(message)
            if message == 50 and len(killed) < 2:
                killed.append(message)
                ray.kill(here._runners[0]._actor)
                ray.kill(here._runners[-1]._actor)

        run_again(here, Count(2000), kill, ignore)
        assert killed and told[-2000:] == list(range(2000))
        wait_until(lambda: len(here._runners) == len(backend("cpu").places()))
        assert here.run(Count(1), ignore)[1] == 1


def test_nodes_that_leave_and_join_are_noticed(spec, one_thread):
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1, resources={RESOURCE: 1})
        crew = ray_runner.ray_crew(spec, HARDWARE, cluster.address)
        try:
            assert crew.workers == 1
            cluster.add_node(num_cpus=1, resources={RESOURCE: 1})
            wait_until(lambda: len(crew._runners) == 2)

            own = ray.get_runtime_context().get_node_id()  # without it this process could not go on
            leaving = [node for node in cluster.worker_nodes if node.node_id != own][:1]

            def leave(message):
                if message == 10 and leaving:
                    cluster.remove_node(leaving.pop(), allow_graceful=False)

            for _ in range(3):  # whichever the node is at
                assert run_again(crew, Count(3000), leave, ignore)[1] == 1
            assert not leaving
        finally:
            crew.close()
    finally:
        cluster.shutdown()


def test_a_cluster_without_such_a_device_is_refused_with_what_to_start(spec, one_thread):
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        with pytest.raises(WorkersError, match=f"offers this device: .*{RESOURCE}"):
            ray_runner.ray_crew(spec, HARDWARE, cluster.address)
    finally:
        cluster.shutdown()


def test_a_cluster_that_cannot_be_reached_is_an_error(spec):
    with pytest.raises(WorkersError, match=r"cannot reach 127\.0\.0\.1:1"):
        ray_runner.ray_crew(spec, HARDWARE, "127.0.0.1:1")
