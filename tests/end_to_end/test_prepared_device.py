"""A whole search on a device that has what a GPU has: processes that prepare, graphs, crossovers.

The CPU pretends to be one. What only such a device is asked for runs here where there is no GPU.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from typing import ClassVar

import pytest
import torch

from autoquant import devices
from autoquant.candidates import registry
from autoquant.delivery.on_disk import apply_to_disk
from autoquant.devices.cpu import CpuBackend
from autoquant.events import Notice, StageFinished
from autoquant.models import targets
from autoquant.profiler import entrant, trials
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Device
from autoquant.runtime import parts
from autoquant.store import open_store

from . import quick
from .tiny import save_llama, save_text

pytestmark = pytest.mark.slow

TUNED_FORMAT = '''
"""A format whose kernels a library tunes; a file tells what it was asked for."""
import contextlib, os
from pathlib import Path

import torch.nn.functional as F
import torch
from autoquant.candidates import A16, Format, Kernel
from autoquant.candidates.kernels.library import TunedLibrary

def log(what):
    with Path(os.environ["TUNED_LOG"]).open("a") as file:
        file.write(f"{os.getpid()} {what}\\n")

class Library(TunedLibrary):
    def missing_reason(self):
        return None
    def load(self, folder):
        log(f"load {len(list(folder.glob('own-*')))}")
    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"own-{os.getpid()}").touch()
        log("save")
    def tune_briefly(self):
        log("briefly")
    def tune_alone(self, threads):
        log("alone")
    @contextlib.contextmanager
    def untuned(self, *, timed):
        log("timed" if timed else "untuned")
        before, tuning[0] = tuning[0], False
        yield
        tuning[0] = before

tuning = [True]

def linear(x, weight, bias):
    if tuning[0]:
        log(f"tuned for {x.numel() // x.shape[-1]} rows")
    return F.linear(x, weight.to(x.dtype), bias)

def few_rows(_shape, m, _device):
    return "too many rows" if m > 16 else None

def many_rows(_shape, m, _device):
    return "too few rows" if m <= 16 else None

shared = dict(numerics=A16, linear=linear, opaque=True, library=Library())
tuned = Format(
    id="own8/plain",
    quantize=lambda weight: weight.to(torch.float8_e4m3fn),
    dequantize=lambda stored: stored.float(),
    kernels=(Kernel(id="few", unsupported=few_rows, **shared), Kernel(id="many", unsupported=many_rows, **shared)),
)
'''


class Replayed:
    """A step as a graph replays it: with inputs of its own, and its state put back at first."""

    captured: ClassVar[Counter[tuple[torch.Size, ...]]] = Counter()

    def __init__(self, step, state, pool=None):
        self.step, self.state, self.inputs = step, state, {}

    def __call__(self, *arguments):
        shapes = tuple(argument.shape for argument in arguments)
        if shapes not in self.inputs:
            before = [tensor.clone() for tensor in self.state()]
            self.step(*arguments)
            for tensor, value in zip(self.state(), before, strict=True):
                tensor.copy_(value)
            self.inputs[shapes] = [argument.clone() for argument in arguments]
            self.captured[shapes] += 1
        for mine, given in zip(self.inputs[shapes], arguments, strict=True):
            mine.copy_(given)
        return self.step(*self.inputs[shapes])


class PretendedGpu(CpuBackend):
    """The CPU, with memory of its own and all that a GPU is asked for."""

    divisions = ("parts", "regions", "whole")
    graphs = prepares = settles_routes = judges_long = True
    forks = False

    def fingerprint(self):
        return Device(
            type="cpu",
            name="pretended",
            capability="sm_90",
            threads=0,
            cache_bytes=1 << 16,
            versions={"torch": torch.__version__},
        )

    def compile_failure(self):
        return None

    def free_bytes(self):
        return 4 << 30

    def graphed(self, step, state, pool=None):
        return Replayed(step, state, pool)


@pytest.fixture
def tuned_format(tmp_path, monkeypatch):
    """An installed package with the format, and the file that its library writes."""
    package = tmp_path / "site"
    about = package / "own_kernels-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Name: own-kernels\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[autoquant.candidates]\nown = own_kernels:tuned\n")
    (package / "own_kernels.py").write_text(TUNED_FORMAT)
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("TUNED_LOG", str(tmp_path / "log"))
    registry._from_entry_points.cache_clear()
    yield tmp_path / "log"
    monkeypatch.undo()
    registry._from_entry_points.cache_clear()


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The CPU is a GPU in this process. Nothing is compiled, here or by those that prepare."""
    start = trials.Workers.__init__

    def start_eager(workers, *arguments):
        start(workers, *arguments)
        device, tuning, _compiled, effort = workers._arguments
        workers._arguments = (device, tuning, False, effort)

    monkeypatch.setattr(trials.Workers, "__init__", start_eager)
    monkeypatch.setattr(devices, "BACKENDS", (PretendedGpu,))
    monkeypatch.setattr(targets, "BACKENDS", (PretendedGpu,))
    monkeypatch.setattr(parts, "FUNCTIONS", {})
    monkeypatch.setattr(parts, "compile_graph", lambda graph, _inputs, **_settings: graph)
    monkeypatch.setattr(entrant, "_compile", lambda traced, _example: traced)
    monkeypatch.setattr(Replayed, "captured", Counter())
    monkeypatch.delenv("AUTOQUANT_IN_PROCESS")
    for name in ("AUTOQUANT_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


@pytest.fixture
def search(gpu, tuned_format, tmp_path):
    """Return what searches for a plan of `own8/plain`."""
    return functools.partial(
        quick.search,
        save_llama(tmp_path / "model"),
        save_text(tmp_path / "text.txt"),
        tmp_path / "plan.db",
        candidates=["own8/plain"],
        workload="prefill=40,decode=4",
        minimize="memory",
        max_ppl_increase=None,
    )


def test_a_search_prepares_and_replays(search, tuned_format):
    told = []
    study = search(listener=told.append)
    stages = [event.stage for event in told if isinstance(event, StageFinished)]
    assert stages[:4] == ["record", "roofline", "prepare", "profile"]
    assert "deliver" in stages
    notices = "".join(event.text for event in told if isinstance(event, Notice))
    assert "a process that uses cpu cannot be forked" in notices

    # Tuned in a process that prepares, and used by this one, which times.
    log = [line.split(maxsplit=1) for line in tuned_format.read_text().splitlines()]
    of_worker = [what for process, what in log if int(process) != os.getpid()]
    of_search = [what for process, what in log if int(process) == os.getpid()]
    assert of_worker[:3] == ["load 0", "briefly", "timed"] and "save" in of_worker
    assert "load 1" in of_search and "alone" in of_search

    # The unquantized model's steps and every plan's are replayed.
    proofs = study.store.proofs(study.study_id)
    tokens = Counter(shapes[0][1] for shapes in Replayed.captured.elements())
    assert tokens == {40: len(proofs), 1: len(proofs)}
    assert not any(note for proof in proofs.values() for note in proof.notes)

    (delivery,) = study.deliveries().values()
    assert (delivery.where, delivery.logits_error, delivery.reason) == ("new process", 0.0, "")


def changes_of_kernel(study):
    """Return up to how many rows each kernel of the uniform plan is used."""
    uniform = next(plan for plan in study.plans() if plan.kind == "uniform")
    own = {layer.name: layer.route for layer in uniform.layers if layer.format == "own8/plain"}
    assert [step.kernel for step in own.pop("lm_head")] == ["few"]  # it is given one row only
    return [(step.upper_m, step.kernel) for route in set(own.values()) for step in route]


def test_crossovers_are_measured_if_there_is_time(search, tmp_path):
    told = []
    study = search(listener=told.append)
    (left,) = (event.text for event in told if isinstance(event, Notice) and "rows" in event.text)
    assert left.startswith("not measured, for want of time") and "uniform own8" in left
    assert changes_of_kernel(study) == [(6, "few"), (None, "many")]

    # From 1 and 40 rows, and doublings between.
    study = search(budget_s=120)
    assert changes_of_kernel(study) == [(16, "few"), (None, "many")]
    timed = open_store(tmp_path / "plan.db").timings(PretendedGpu("cpu").fingerprint(), PROTOCOL)
    assert {subject.m for subject in timed} == {1, 2, 3, 6, 12, 22, 40}


def test_checking_what_was_applied_tunes_no_kernel_and_compiles_none_twice(
    search, tuned_format, tmp_path, monkeypatch
):
    study = search()
    tuned_format.unlink()
    plan = next(plan for plan in study.plans() if plan.kind == "uniform")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name)  # as in a new process
    apply_to_disk(plan, tmp_path / "model", tmp_path / "applied", facts=study.facts)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "autoquant_cache" / "triton")
    assert "untuned" in tuned_format.read_text() and "tuned for" not in tuned_format.read_text()
