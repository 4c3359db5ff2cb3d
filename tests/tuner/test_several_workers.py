"""Stages with several workers: the same facts in the same order, whoever measured them, and less time."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from contextlib import closing

import pytest
from builders.records import make_choice, put_study
from builders.runner import FakeRunner, say_what_is_predicted
from builders.space import SITES, make_ledger, make_space

from autoquant.errors import ProcessDiedError, WorkerLostError
from autoquant.evaluators.sensitivity import SENSITIVITIES
from autoquant.events import Notice, StageProgress
from autoquant.records import RouteStep
from autoquant.solver.limits import Limits
from autoquant.store import open_store
from autoquant.tuner.choices import SiteChoices
from autoquant.tuner.profiling import measure_all
from autoquant.tuner.scoring import score
from autoquant.tuner.stages import refine as stage
from autoquant.tuner.stages.prove import prove_front, prove_references
from autoquant.tuner.workers.crew import Crew
from autoquant.tuner.workers.jobs import AtWork, ProfileJob, ProveJob, Timed

from .test_profiling import DEVICE, measurement, subject

pytestmark = pytest.mark.usefixtures("quick_collector")
LIMITS = Limits(max_ppl_increase=0.01)


class Pool:
    """Runners that do what fake ones do, each job after a short while of its own, and are lost at times."""

    def __init__(self, workers, lost=0.0, prove=say_what_is_predicted, longest_s=0.004):
        self.random = random.Random(0)
        self.jobs = []
        self._lock = threading.Lock()
        self._lost, self._prove, self._longest_s = lost, prove, longest_s
        self.crew = Crew()
        for _ in range(workers):
            self.crew.join(lambda: self)
        self.crew.wait_for_all()

    def run(self, job, on_message):
        with self._lock:
            self.jobs.append(job)
            wait_s = self.random.uniform(0, self._longest_s)
            lost = self.random.random() < self._lost
        time.sleep(wait_s)
        if lost:
            raise WorkerLostError("it is gone")
        return FakeRunner(prove=self._prove).run(job, on_message)

    def close(self):
        pass


@pytest.fixture
def proven(tmp_path, quick_solver):
    """Prove and refine with so many workers; gives the plans in the order in which they count, and the pool."""

    def run(workers, **changes):
        store = open_store(tmp_path / f"{workers}-{len(list(tmp_path.iterdir()))}.db")
        put_study(store)
        pool = Pool(workers, **changes)
        ledger = make_ledger(store, pool.crew, events := [])
        try:
            referenced = prove_references(make_space(), ledger, SITES, LIMITS)
            prove_front(referenced, ledger, LIMITS)
            stage.refine(referenced, ledger, LIMITS, 0)
            best = ledger.study.candidate()
        finally:
            pool.crew.close()
            store.close()
        proofs = [(ledger.plans[i].label, proof) for i, proof in ledger.proofs.items()]
        return proofs, best.plan_id, pool, events

    return run


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_proofs_their_order_and_the_best_plan_do_not_depend_on_the_number_of_workers(
    proven, workers
):
    one, best, _, _ = proven(1)
    several, best_of_several, _, _ = proven(workers)
    assert several == one and best_of_several == best and len(one) > 12


@pytest.mark.parametrize("kind", ["original", "uniform", "refined"])
def test_workers_prove_at_the_same_time(proven, kind):
    both = threading.Barrier(2)
    met = []

    def meeting(plan):
        if plan.kind == kind and not met:
            both.wait(10)
            met.append(plan)
        return say_what_is_predicted(plan)

    proven(2, prove=meeting)
    assert met and not both.broken


def test_every_worker_proves_the_unquantized_model_first_and_every_other_plan_is_proven_once(
    proven,
):
    _, _, pool, _ = proven(3)
    plans = [job.plan for job in pool.jobs if isinstance(job, ProveJob)]
    assert [plan.kind for plan in plans[:3]] == ["original"] * 3
    counts = Counter(plan.plan_id for plan in plans[3:])
    assert set(counts.values()) == {1}


def test_workers_that_are_lost_at_any_moment_change_nothing(proven):
    one, best, _, _ = proven(1)
    several, best_of_several, _, events = proven(2, lost=0.1)
    assert several == one and best_of_several == best
    assert any(isinstance(e, Notice) and e.text == "tried once more: it is gone" for e in events)


def test_a_plan_that_fails_fails_for_any_number_of_workers(proven):
    def broken(plan):
        if plan.kind == "front":
            raise RuntimeError("no memory")
        return say_what_is_predicted(plan)

    one, _, _, _ = proven(1, prove=broken)
    several, _, _, _ = proven(2, prove=broken)
    assert several == one


class Timing:
    """Times after a while; a worker is lost at its first jobs, a process dies at deadly subjects."""

    def __init__(self, deadly=(), losses=0):
        self.jobs, self.deadly, self.losses = [], deadly, losses

    def run(self, job, on_message):
        self.jobs.append(job)
        if self.losses:
            self.losses -= 1
            raise WorkerLostError("it is gone")
        for each in job.subjects:
            on_message(AtWork(each))
            if each in self.deadly:
                raise ProcessDiedError("SIGSEGV")
        time.sleep(0.002)
        on_message(Timed(tuple(map(measurement, job.subjects))))
        on_message(StageProgress("profile", 7, "own number"))

    def close(self):
        pass


@pytest.fixture
def timed(tmp_path):
    def run(workers, subjects, together=False, **changes):
        store = open_store(tmp_path / f"{time.monotonic_ns()}.db")
        store.put_device(DEVICE)
        runner, events, crew = Timing(**changes), [], Crew()
        for _ in range(workers):
            crew.join(lambda: runner)
        crew.wait_for_all()
        try:
            found = measure_all(
                subjects,
                runner=crew,
                hardware=DEVICE,
                store=store,
                listener=events.append,
                together=together,
            )
        finally:
            crew.close()
            store.close()
        return found, [job for job in runner.jobs if isinstance(job, ProfileJob)], events

    return run


MANY = [subject(m, kernel) for m in (1, 2, 3, 5, 8) for kernel in ("right", "wrong")]


def test_each_shape_and_m_is_a_job_of_its_own_the_largest_first(timed):
    found, jobs, events = timed(2, MANY)
    assert list(found) == MANY and found == {each: measurement(each) for each in MANY}
    assert sorted(job.subjects[0].m for job in jobs) == [1, 2, 3, 5, 8]
    assert {jobs[0].subjects[0].m, jobs[1].subjects[0].m} == {8, 5}
    assert all({each.m for each in job.subjects} == {job.subjects[0].m} for job in jobs)
    done = [e.done for e in events if isinstance(e, StageProgress)]
    assert done == sorted(done) and done[-1] == len(MANY)  # of all jobs, not of each


def test_where_candidates_are_prepared_each_worker_gets_one_share(timed):
    found, jobs, _ = timed(2, MANY, together=True)
    assert found == {each: measurement(each) for each in MANY}
    assert sorted(sorted({each.m for each in job.subjects}) for job in jobs) == [[1, 2, 8], [3, 5]]


def test_workers_that_are_lost_while_they_time_cost_no_candidate(timed):
    found, _, _ = timed(2, MANY, losses=2)
    assert found == {each: measurement(each) for each in MANY}


def test_a_candidate_that_ends_its_process_is_found_among_several_workers(timed):
    deadly = MANY[4]
    found, _, _ = timed(2, MANY, deadly=(deadly,))
    assert found[deadly].outcome == "failed" and "SIGSEGV" in found[deadly].reason
    assert all(found[each] == measurement(each) for each in MANY if each != deadly)


@pytest.mark.parametrize(("method", "jobs"), [("path", 2), ("isolated", 3)])
def test_layers_are_scored_in_shares_and_what_is_scored_together_stays_together(
    tmp_path, method, jobs
):
    def kernel(name):
        return (RouteStep(upper_m=None, kernel=name),)

    choices = [
        SiteChoices(
            site,
            tuple(
                make_choice(
                    site.name, "int8-row/plain", shape=site.shape, route=kernel(name), numerics=""
                )
                for name in ("int-mm", "int8pack-mm")
            ),
            {},
        )
        for site in SITES
    ]
    found = []
    for workers in (1, 3):
        with closing(open_store(tmp_path / f"{workers}.db")) as store:
            store.put_model("m0del", {})
            pool = Pool(workers, lost=0.1)
            scores = score(
                choices,
                method=SENSITIVITIES[method],
                model_hash="m0del",
                quality_key="text",
                device_type="cpu",
                runner=pool.crew,
                store=store,
                listener=lambda _event: None,
            )
            pool.crew.close()
        found.append(scores.losses)
    assert found[0] == found[1] and len(found[0]) == 2 * len(SITES)
    asked = {tuple(dict.fromkeys(c[1] for c in job.changes)) for job in pool.jobs}
    sites = {tuple(dict.fromkeys(c[0].name for c in job.changes)) for job in pool.jobs}
    assert len(asked if method == "path" else sites) == jobs
    together = asked if method == "path" else sites
    assert sum(map(len, together)) == len(set().union(*together))
