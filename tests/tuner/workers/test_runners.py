"""Jobs in processes of their own: the same results, memory given back, crashes survived, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from end_to_end.tiny import save_llama
from models.tiny_models import Perceptron
from torch import nn

from autoquant.candidates import A16, Format, Kernel, register, registry
from autoquant.devices.effort import TimingEffort
from autoquant.errors import CandidateError, HungError, ModelError, ProcessDiedError
from autoquant.evaluators.quality import FunctionQuality, TextQuality
from autoquant.evaluators.text import TextParts
from autoquant.events import Notice
from autoquant.models import SameModel, from_module, load_model
from autoquant.profiler.record import record
from autoquant.records import Workload
from autoquant.runtime.phases import make_phases
from autoquant.tuner.workers.forking import ForkingRunner
from autoquant.tuner.workers.in_process import InProcessRunner
from autoquant.tuner.workers.jobs import Bench, BenchSpec, LoadJob, Scored, ScoreJob
from autoquant.tuner.workers.start import IN_PROCESS_VARIABLE, start_runner

from .made_up_jobs import Count, Crash, Devour, Fail, Fill, Hang, Sleep, Stay

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="jobs run in this process elsewhere"),
]
WORKLOAD = Workload.parse("prefill=4,decode=2")
FORMATS = ("bfloat16/plain", "int8-row/plain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("apart") / "model")


@pytest.fixture(scope="module")
def parts():
    generator = torch.Generator().manual_seed(5)
    sizes = {"calibration": 2, "selection": 2, "report": 2}
    return TextParts(
        {
            part: torch.randint(0, 64, (count, 20), generator=generator)
            for part, count in sizes.items()
        }
    )


@pytest.fixture(scope="module")
def bench(folder, parts):
    loaded = load_model(folder)
    return Bench(
        load=lambda: loaded,
        quality=TextQuality(parts, "cpu"),
        workload=WORKLOAD,
        device="cpu",
        execution="eager",
    )


@pytest.fixture(scope="module")
def spec(bench):
    return BenchSpec(
        model=SameModel.of(bench.loaded),
        judged_on=bench.quality.parts,
        workload=WORKLOAD,
        device="cpu",
        execution="eager",
        formats=FORMATS,
        threads=2,
    )


@pytest.fixture(scope="module")
def shared(spec):
    """A runner that every test leaves able to run."""
    runner = ForkingRunner(spec)
    yield runner
    runner.close()


def run(runner, job):
    """(result, what was told)."""
    told = []
    return runner.run(job, told.append), told


def is_running(process):
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_scores_from_another_process_are_those_of_this_one(bench, shared):
    phases = make_phases(bench.loaded, WORKLOAD)
    sites = record(bench.loaded.module, phases).sites
    job = ScoreJob(
        [
            (site, f"int8-row+{how}", "int8-row/plain", how)
            for site in sites
            for how in ("a16", "a8-row")
        ],
        "isolated",
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    _, here = run(InProcessRunner(bench), job)
    torch.set_num_threads(threads)
    _, apart = run(shared, job)
    assert all(isinstance(message, Scored) for message in apart)
    assert [(m.subject, m.losses) for m in apart] == [(m.subject, m.losses) for m in here]
    assert max(loss for message in apart for loss in message.losses.values()) > 0


def test_every_job_gets_a_fresh_process_with_the_wanted_threads(shared):
    processes = set()
    for _ in range(3):
        (process, threads), told = run(shared, Count(4))
        assert told == [0, 1, 2, 3] and threads == 2
        processes.add(process)
    assert len(processes) == 3 and os.getpid() not in processes
    wait_until(lambda: not any(map(is_running, processes)))


def test_jobs_of_a_class_that_keeps_its_process_follow_each_other_in_it(shared):
    first, _ = run(shared, Stay())
    assert run(shared, Stay())[0] == first
    run(shared, Count(1))
    wait_until(lambda: not is_running(first))
    other, _ = run(shared, Stay())
    assert other != first
    run(shared, Count(1))
    wait_until(lambda: not is_running(other))


@pytest.mark.parametrize("then", ["fail", "crash", "killed between"])
def test_a_kept_process_that_failed_is_not_used_again(shared, then):
    process, _ = run(shared, Stay())
    if then == "killed between":
        os.kill(process, signal.SIGKILL)
        wait_until(lambda: not is_running(process))
    with pytest.raises(ValueError if then == "fail" else ProcessDiedError):
        run(shared, Stay(then))
    assert run(shared, Stay())[0] != process
    assert run(shared, Count(1))[1] == [0]


def test_a_job_that_is_silent_for_too_long_is_ended_and_the_next_one_runs(shared):
    began = time.monotonic()
    with pytest.raises(HungError, match="it did not end within 1 s"):
        run(shared, Hang(silence_s=1.0))
    assert time.monotonic() - began < 20
    assert run(shared, Count(2))[1] == [0, 1]


def test_a_job_that_ends_its_process_as_if_all_were_well_has_died(shared):
    with pytest.raises(ProcessDiedError, match="exit code 0"):
        run(shared, Crash(0))


def test_a_job_that_takes_too_much_memory_is_ended(spec):
    runner = ForkingRunner(replace(spec, effort=TimingEffort(most_memory=0.01)))
    try:
        with pytest.raises(ProcessDiedError, match=r"it took \d+\.\d GiB of memory"):
            run(runner, Devour())
        assert run(runner, Count(1))[1] == [0]
    finally:
        runner.close()


def test_what_a_job_raises_is_raised_here_with_its_traceback(shared):
    with pytest.raises(ValueError, match="no luck") as caught:
        run(shared, Fail("no luck"))
    assert "made_up_jobs.py" in caught.value.__notes__[-1]
    with pytest.raises(RuntimeError, match="OddError: 1"):
        run(shared, Fail(""))


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGKILL, "SIGKILL"), (-3, "exit code 3")],
)
def test_a_crash_is_an_error_that_says_how_and_the_next_job_runs(shared, number, how):
    told = []
    with pytest.raises(ProcessDiedError, match=how):
        shared.run(Crash(number), told.append)
    assert [len(message) for message in told] == [100_000]
    assert run(shared, Count(1))[1] == [0]


def test_memory_of_a_job_is_given_back(shared):
    def used_mib():
        found = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(
                    line.split(":\t", 1)
                    for line in status.read_text().splitlines()
                    if ":\t" in line
                )
                command = status.with_name("cmdline").read_text()
            except OSError:
                continue
            if "autoquant.tuner.workers.worker" in command:
                found += int(fields.get("VmRSS", "0 kB").split()[0]) >> 10
        return found

    before = used_mib()
    for _ in range(2):
        assert run(shared, Fill(300))[0] == 1024**3
    wait_until(lambda: used_mib() < before + 30)


def test_an_interrupt_ends_the_job_at_work_and_its_process(spec):
    runner = ForkingRunner(spec)
    processes = []

    def interrupt(message):
        processes.append(message)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(Sleep(), interrupt)
    wait_until(lambda: not is_running(processes[0]))
    assert run(runner, Count(2))[1] == [0, 1]  # by a new worker
    runner.close()
    runner.close()


def test_a_worker_that_somebody_ends_is_an_error_and_replaced(spec):
    runner = ForkingRunner(spec)

    def end_worker(process):
        parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
        os.kill(int(parent), signal.SIGKILL)

    with pytest.raises(ProcessDiedError, match="from outside"):
        runner.run(Sleep(), end_worker)
    assert run(runner, Count(1))[1] == [0]
    runner.close()


SEARCHING = """
import pickle, sys
from autoquant.tuner.workers.forking import ForkingRunner
from tuner.workers.made_up_jobs import Sleep
if __name__ == "__main__":
    ForkingRunner(pickle.load(open(sys.argv[1], "rb"))).run(Sleep(), lambda process: print(process, flush=True))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_one_that_searches(spec, tmp_path, how):
    import pickle

    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SEARCHING, str(tmp_path / "spec")]
    searching = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        ),  # which a runner in the background ignores
    )
    process = int(searching.stdout.readline())
    worker = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    assert is_running(process) and is_running(worker)
    searching.send_signal(how)
    searching.wait(20)
    searching.stdout.close()
    wait_until(lambda: not is_running(process) and not is_running(worker))


def test_a_script_without_a_main_guard_is_not_run_again(spec, tmp_path):
    import pickle

    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    script = tmp_path / "script.py"
    script.write_text(
        SEARCHING.replace('if __name__ == "__main__":', "if True:").replace("Sleep()", "Sleep(0)")
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(script), str(tmp_path / "spec")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize("job", [LoadJob(), ScoreJob([], "isolated")])
def test_a_model_that_was_changed_is_refused(spec, job):
    runner = ForkingRunner(replace(spec, model=replace(spec.model, content_hash="another")))
    with pytest.raises(ModelError, match="changed while"):
        run(runner, job)
    runner.close()


def test_an_unknown_format_is_refused(spec):
    with pytest.raises(CandidateError, match="elsewhere/plain"):
        ForkingRunner(replace(spec, formats=("elsewhere/plain",)))


# -- which runner a search gets -----------------------------------------------------------------------------------


def chosen(bench, formats=FORMATS):
    """(kind of runner, notices)."""
    events = []
    runner = start_runner(bench, formats, events.append)
    runner.close()
    assert all(isinstance(event, Notice) for event in events)
    return type(runner), [event.text for event in events]


def test_a_model_from_a_folder_is_worked_on_apart_and_nothing_said(bench):
    assert chosen(bench) == (ForkingRunner, [])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"quality": FunctionQuality(lambda module, part: [1.0], "own")},
            "quality function is the caller's own",
        ),
        ({"load": lambda: from_module(nn.Sequential(Perceptron()))}, "live module"),
        ({"device": "cuda:0"}, "cuda:0 cannot be forked"),
    ],
)
def test_what_only_this_process_has_stays_here_and_why_is_said(bench, changes, why):
    kind, (notice,) = chosen(replace(bench, **changes))
    assert kind is InProcessRunner and why in notice


def test_a_format_registered_in_this_process_stays_here(bench, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    kernel = Kernel(id="matmul", numerics=A16, linear=torch.nn.functional.linear)
    register(
        Format(
            id="own/plain", quantize=lambda w: w, dequantize=lambda s: s.float(), kernels=(kernel,)
        )
    )
    kind, (notice,) = chosen(bench, (*FORMATS, "own/plain"))
    assert kind is InProcessRunner and "own/plain is registered in this process only" in notice


def test_a_model_that_cannot_be_loaded_again_stays_here(bench):
    source = replace(bench.loaded.source, path="/no/such/folder")
    loaded = from_module(bench.loaded.module)
    loaded.source = source
    kind, (notice,) = chosen(replace(bench, load=lambda: loaded))
    assert kind is InProcessRunner and "/no/such/folder" in notice


def test_one_process_can_be_asked_for(bench, monkeypatch):
    monkeypatch.setenv(IN_PROCESS_VARIABLE, "1")
    kind, (notice,) = chosen(bench)
    assert kind is InProcessRunner and IN_PROCESS_VARIABLE in notice


STARTING = """
import time
from autoquant.tuner.workers.forking import start_process
process, _ = start_process("autoquant.tuner.workers.delivery_worker")
time.sleep(0.5)  # it is bound to this process, and imports
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.processes
def test_a_process_that_still_imports_ends_with_the_one_that_started_it():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", STARTING]
    starting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    process = int(starting.stdout.readline())
    os.kill(process, signal.SIGSTOP)  # as long as its imports may take
    starting.kill()
    starting.wait(20)
    starting.stdout.close()
    wait_until(lambda: not is_running(process))
