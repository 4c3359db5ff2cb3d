"""A search whose work runs in processes of their own: crashing kernels are facts, and nothing else changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from autoquant.candidates import registry
from autoquant.events import Notice, StageFinished, StageProgress, StageStarted
from autoquant.tuner import driver
from autoquant.tuner.setup import SearchSetup
from autoquant.tuner.stages import prove

from .conftest import WORKLOAD, rows
from .tiny import save_llama, save_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="all is one process elsewhere"),
]

CRASHING_KERNELS = """
import os, signal
import torch, torch.nn.functional as F
from autoquant.candidates import A16, Format, Kernel

def crash(x, w, b):
    os.kill(os.getpid(), signal.SIGSEGV)

def fragile(x, w, b):
    if x.numel() // x.shape[-1] > 8:  # never in the workload, always in the evaluation text
        os.kill(os.getpid(), signal.SIGBUS)
    return F.linear(x, w.to(x.dtype), b)

def formats(): return [
    Format(id=f"{f.__name__}/plain", quantize=lambda w: w.to(torch.float8_e4m3fn), dequantize=lambda s: s.float(),
           kernels=(Kernel(id="matmul", numerics=A16, linear=f),))
    for f in (crash, fragile)
]
"""


@pytest.fixture(scope="module")
def plug_in(tmp_path_factory):
    """An installed package with a kernel that always brings its process down, and one that does so on long inputs."""
    package = tmp_path_factory.mktemp("site")
    (package / "crashing_kernels-1.0.dist-info").mkdir()
    (package / "crashing_kernels-1.0.dist-info" / "METADATA").write_text(
        "Name: crashing-kernels\nVersion: 1.0\n"
    )
    entry_points = "[autoquant.candidates]\ncrashing = crashing_kernels:formats\n"
    (package / "crashing_kernels-1.0.dist-info" / "entry_points.txt").write_text(entry_points)
    (package / "crashing_kernels.py").write_text(CRASHING_KERNELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(package))
        registry._from_entry_points.cache_clear()
        yield
    registry._from_entry_points.cache_clear()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    place = tmp_path_factory.mktemp("apart")
    return save_llama(place / "model", layers=1), save_text(place / "text.txt", windows=16)


def search(
    small,
    db,
    *,
    candidates=("crash*", "fragile*", "int8-row/plain/int-mm"),
    budget_s=0.5,
    events=None,
):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AUTOQUANT_IN_PROCESS", raising=False)
        patch.setenv("AUTOQUANT_EAGER", "1")
        patch.setattr(prove, "LEAST_PLANS", 1)
        patch.setattr(prove, "FRONT_PLANS", 1)
        torch.set_num_threads(1)
        return driver.search(
            str(small[0]),
            eval_text=str(small[1]),
            db=str(db),
            device="cpu",
            workload=WORKLOAD,
            candidates=candidates,
            time_budget_s=budget_s,
            listener=(events if events is not None else []).append,
        )


@pytest.fixture(scope="module")
def searched(small, plug_in, tmp_path_factory):
    """(study, database, events) of a search with the bad kernels and time for all uniform plans."""
    db, events = tmp_path_factory.mktemp("crashed") / "plan.db", []
    return search(small, db, budget_s=300, events=events), db, events


def test_a_kernel_that_crashes_while_it_is_timed_has_failed_and_the_search_ends(searched):
    study, db, _ = searched
    outcomes = {}
    for *_, fmt, _kernel, outcome, reason in timings(db):
        outcomes.setdefault(fmt, set()).add((outcome, reason))
    ended = "its process was ended by SIGSEGV"
    tried = {each for each in outcomes["crash/plain"] if not each[1].startswith("not tried: at ")}
    assert tried == {("failed", ended)}
    for outcome, reason in outcomes["crash/plain"] - tried:  # since it ended two processes
        assert outcome == "failed" and reason.endswith(ended)
    # It ends its process as soon as a plan with it is checked with more rows than were timed.
    assert {outcome for outcome, _ in outcomes["fragile/plain"]} == {"incorrect"}
    assert all(
        reason.startswith("found wrong when a plan was proven")
        and reason.endswith("its process was ended by SIGBUS")
        for _, reason in outcomes["fragile/plain"]
    )
    assert {outcome for outcome, _ in outcomes["int8-row/plain"]} == {"ok"}
    assert study.facts.complete and study.recommended() is not None


def test_a_plan_that_crashes_when_it_is_proven_has_failed_with_the_reason(searched):
    study, _, events = searched
    failed = study.store.failed_proofs(study.study_id)
    plans = {plan.plan_id: plan for plan in study.plans()}
    assert {"fragile/plain"} <= set(plans[next(iter(failed))].formats())
    assert all("ended by SIGBUS" in reason for reason in failed.values())
    assert any(
        isinstance(e, Notice) and "could not be proven" in e.text and "SIGBUS" in e.text
        for e in events
    )
    kinds = [plans[plan_id].kind for plan_id in study.proofs()]
    assert kinds.count("original") == 1 and "uniform" in kinds


def test_progress_is_reported_from_the_other_processes(searched):
    _, _, events = searched
    for stage in ("profile", "score", "prove"):
        assert any(isinstance(e, StageStarted) and e.stage == stage for e in events)
        assert any(isinstance(e, StageProgress) and e.stage == stage for e in events)
        assert any(isinstance(e, StageFinished) and e.stage == stage for e in events)


def test_the_same_search_again_meets_no_crash_and_measures_nothing(searched, small):
    _, db, _ = searched
    before = rows(db)
    search(small, db)
    assert rows(db) == before


def test_scores_and_qualities_are_those_of_one_process(small, tmp_path):
    """Which plans come out depends on timings; what a plan scores does not."""
    quick = ("int8-row/plain/int8pack-mm",)
    apart = search(small, tmp_path / "apart.db", candidates=quick)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SearchSetup, "start_runner", one_process(SearchSetup.start_runner))
        here = search(small, tmp_path / "here.db", candidates=quick)

    def facts(study):
        plans = {plan.plan_id: plan for plan in study.plans()}
        return {
            plans[i].label: (
                proof.loss,
                proof.kl,
                proof.increase,
                proof.selection_increase,
                proof.memory_bytes,
            )
            for i, proof in study.proofs().items()
            if plans[i].kind in ("original", "uniform")
        }

    assert facts(apart) == facts(here) and len(facts(here)) == 2
    losses = [
        sorted(row[4:7] for row in rows(tmp_path / name)["loss"])
        for name in ("apart.db", "here.db")
    ]
    assert losses[0] == losses[1] and losses[0]


def one_process(runner):
    def start(stages):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AUTOQUANT_IN_PROCESS", "1")
            return runner(stages)

    return start


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_search_that_is_stopped_leaves_no_process_and_goes_on(small, tmp_path, how):
    db = tmp_path / "plan.db"
    command = [
        sys.executable,
        "-m",
        "autoquant",
        "search",
        small[0],
        "--eval-text",
        small[1],
        "--db",
        db,
    ]
    command += [
        "--workload",
        WORKLOAD,
        "--candidates",
        "int8-row/plain/int-mm",
        "--time-budget",
        "1s",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "AUTOQUANT_EAGER": "1",
    }
    environment["OMP_NUM_THREADS"] = "1"
    environment.pop("AUTOQUANT_IN_PROCESS", None)
    searching = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        ),  # which a runner in the background ignores
    )
    deadline = time.monotonic() + 60
    while not (db.exists() and len(timings(db)) >= 2):
        assert time.monotonic() < deadline and searching.poll() is None
        time.sleep(0.02)
    family = descendants(searching.pid)
    assert family
    searching.send_signal(how)
    _, said = searching.communicate(timeout=20)
    if how == signal.SIGINT:
        assert (
            searching.returncode == 130
            and "the same command goes on" in said
            and "Traceback" not in said
        )
    while any(map(is_running, family)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = timings(db)
    events = []
    search(small, db, candidates=("int8-row/plain/int-mm",), events=events)
    assert set(before) <= set(timings(db))
    assert not any(isinstance(event, Notice) and "one process" in event.text for event in events)


def timings(db):
    """(id, created, n, k, m, format, kernel, outcome, reason) of every timing; none while there is no table."""
    import sqlite3

    connection = sqlite3.connect(f"file:{db}?mode=ro", uri=True)
    try:
        return connection.execute(
            "SELECT id, created, n, k, m, format, kernel, outcome, reason FROM timing ORDER BY id"
        ).fetchall()
    except sqlite3.OperationalError:
        return []
    finally:
        connection.close()


def descendants(process):
    """Ids of the process's children and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found = {process}
    for _ in range(3):
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {process}


def is_running(process):
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False
