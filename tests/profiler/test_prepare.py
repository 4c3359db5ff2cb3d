"""Trying candidates out in processes of their own, on a CPU."""

import os
import signal

import pytest
import torch

from autoquant.candidates import registry
from autoquant.devices import backend
from autoquant.profiler import prepare as module
from autoquant.profiler import trials
from autoquant.profiler.prepare import prepare, workers_kept
from autoquant.records import LinearShape, Roofline, TimingSubject

SHAPE = LinearShape(n=64, k=64, bias=True, dtype="bfloat16")
ROOFLINE = Roofline(bandwidth_bytes_per_s=1e15, flops_per_s={})


def subject(fmt, kernel, m=2):
    return TimingSubject(shape=SHAPE, m=m, format=fmt, kernel=kernel, working_set_bytes=1 << 20)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    for name in ("AUTOQUANT_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("AUTOQUANT_EAGER", "1")  # nothing here is about compiled code


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """An installed package whose formats every process finds; some of their kernels are bad."""
    package = tmp_path / "site"
    (package / "bad_kernels-1.0.dist-info").mkdir(parents=True)
    (package / "bad_kernels-1.0.dist-info" / "METADATA").write_text(
        "Name: bad-kernels\nVersion: 1.0\n"
    )
    (package / "bad_kernels-1.0.dist-info" / "entry_points.txt").write_text(
        "[autoquant.candidates]\nbad = bad_kernels:bad\n"
    )
    (package / "bad_kernels.py").write_text(
        "import os, signal\n"
        "import torch.nn.functional as F\n"
        "from autoquant.candidates import A16, Format, Kernel\n"
        "def crash(x, w, b):\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def fail(x, w, b):\n    raise RuntimeError('out of luck')\n"
        "def wrong(x, w, b):\n    return 2 * F.linear(x, w, b)\n"
        "kernels = tuple(Kernel(id=f.__name__, numerics=A16, linear=f) for f in (crash, fail, "
        "wrong, F.linear))\n"
        "bad = Format(id='bad/plain', quantize=lambda w: w.clone(), dequantize=lambda s: "
        "s.float(), kernels=kernels)\n"
    )
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    )
    registry._from_entry_points.cache_clear()
    yield
    monkeypatch.undo()
    registry._from_entry_points.cache_clear()


def prepared(*subjects, seen=None):
    return prepare(
        subjects,
        device=backend("cpu").fingerprint(),
        device_name="cpu",
        roofline=lambda: ROOFLINE,
        on_progress=lambda done, what: None if seen is None else seen.append((done, what)),
    )


@pytest.mark.processes
def test_a_kernel_that_crashes_takes_only_its_own_process_along(plug_in, monkeypatch):
    monkeypatch.setattr(
        trials.os, "cpu_count", lambda: 2
    )  # one worker, so that what follows needs a new one
    names = ("crash", "fail", "wrong", "linear")
    seen = []
    found = prepared(*(subject("bad/plain", name) for name in names), seen=seen)
    outcomes = {s.kernel: (m.outcome, m.reason) for s, m in found.decided.items()}
    assert outcomes == {
        "crash": ("failed", f"brought its process down (signal {int(signal.SIGSEGV)})"),
        "fail": ("failed", "RuntimeError: out of luck"),
        "wrong": ("incorrect", outcomes["wrong"][1]),
    }
    assert outcomes["wrong"][1].endswith("against the float32 reference")
    assert found.tried == 4 and [done for done, _ in seen] == [1, 2, 3, 4]
    assert {what for _, what in seen} == {f"bad/plain/{name}" for name in names}


def test_what_is_unsupported_is_said_without_a_process(monkeypatch):
    monkeypatch.setattr(trials.Workers, "_begin", lambda self: pytest.fail("a process was started"))
    found = prepared(subject("int8-row/plain", "gemlite"))
    assert [m.outcome for m in found.decided.values()] == ["unsupported"] and found.tried == 0


def test_a_format_of_this_process_alone_is_left_to_it(monkeypatch):
    monkeypatch.setattr(
        registry, "_registered", {"bfloat16/plain": registry.get_format("bfloat16/plain")}
    )
    monkeypatch.setattr(trials.Workers, "_begin", lambda self: pytest.fail("a process was started"))
    assert prepared(subject("bfloat16/plain", "matmul")) == module.Prepared({}, 0, 0.0)


@pytest.mark.processes
def test_no_worker_is_left_when_preparation_ends():
    import multiprocessing

    found = prepared(
        subject("bfloat16/plain", "matmul"), subject("int8-row/plain", "dequantize-matmul")
    )
    assert found.decided == {} or all(m.outcome == "beaten" for m in found.decided.values())
    assert found.tried == 2
    assert not [
        child
        for child in multiprocessing.active_children()
        if child.name.startswith("SpawnProcess")
    ]
    assert torch.get_num_threads() >= 1


@pytest.mark.processes
def test_processes_are_kept_for_the_next_call_where_that_is_asked_for(monkeypatch):
    import multiprocessing

    started = []
    begin = trials.Workers._begin
    monkeypatch.setattr(trials.Workers, "_begin", lambda self: started.append(1) or begin(self))
    monkeypatch.setattr(trials.os, "cpu_count", lambda: 2)
    with workers_kept():
        for m in (2, 3, 4):
            assert prepared(subject("bfloat16/plain", "matmul", m)).tried == 1
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()
        assert prepared(subject("bfloat16/plain", "matmul", 5)).tried == 1  # by another one
    assert len(started) == 2
    assert not multiprocessing.active_children()
