"""A small finished search, made up, in a database."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import autoquant.tuner
from autoquant.events import Notice, StageFinished, StageProgress, StageStarted
from autoquant.records import (
    Delivery,
    Device,
    Interval,
    LayerChoice,
    LinearShape,
    Plan,
    Prediction,
    Proof,
    Recording,
    RouteStep,
    RunTimes,
    Site,
    SiteUse,
    Skipped,
    Workload,
)
from autoquant.store import Store, open_store
from autoquant.study.study import Study

STUDY = "5tudy0000001"
MODEL_HASH = "m0del"
ORIGINAL, UNIFORM, MIXED, SMALL, UNPROVEN = (
    "aaaa00000001", "bbbb00000002", "cccc00000003", "dddd00000004", "eeee00000005",
)  # fmt: skip
BLOCKS = 30
SHAPES = {"q_proj": (256, 256), "up_proj": (1024, 256), "down_proj": (256, 1024)}
ROUTED = (RouteStep(upper_m=16, kernel="weight-only"), RouteStep(upper_m=None, kernel="dynamic"))
PLAIN = (RouteStep(upper_m=None, kernel="torch"),)

DEVICE = Device(
    type="cpu",
    name="Test CPU",
    capability="avx2",
    threads=2,
    cache_bytes=2**24,
    versions={"torch": "2.13"},
)


def layer(name: str, shape: tuple[int, int], fmt: str) -> LayerChoice:
    quantized = fmt != "bf16"
    return LayerChoice(
        name=name,
        shape=LinearShape(n=shape[0], k=shape[1], bias=False, dtype="bf16"),
        format=fmt,
        route=ROUTED if quantized else PLAIN,
        numerics=f"{fmt}:a16",
        latency_us={"prefill": 120.0, "decode": 35.5},
        memory_bytes=shape[0] * shape[1] * (1 if quantized else 2),
        loss=0.0001 if quantized else 0.0,
        reason="fastest within the limit"
        if quantized
        else "quantizing it costs more quality than it saves time",
    )


def plan(plan_id: str, label: str, kind: str, formats: tuple[str, ...], request_ms: float) -> Plan:
    layers = tuple(
        layer(f"model.layers.{block}.{role}", shape, formats[block % len(formats)])
        for block in range(BLOCKS)
        for role, shape in SHAPES.items()
    )
    memory = sum(choice.memory_bytes for choice in layers)
    return Plan(
        plan_id=plan_id,
        study_id=STUDY,
        label=label,
        kind=kind,
        model_hash=MODEL_HASH,
        dtype="bf16",
        layers=layers,
        prediction=Prediction(
            request_ms=request_ms, linear_ms=request_ms * 0.8, loss=0.001, memory_bytes=memory
        ),
    )


def proof(
    plan_id: str, request_ms: float, increase: float, memory_bytes: int, half: float = 0.001
) -> Proof:
    interval = Interval(value=increase, low=increase - half, high=increase + half)
    return Proof(
        plan_id=plan_id,
        request_ms=request_ms,
        phase_ms={"prefill": request_ms / 4, "decode": request_ms / 100},
        original_request_ms=200.0,
        original_phase_ms={"prefill": 50.0, "decode": 2.0},
        perplexity=20.0 * (1 + increase),
        loss=3.0,
        increase=interval,
        selection_increase=interval,
        kl=abs(increase) / 2,
        memory_bytes=memory_bytes,
        notes=("timed once only",),
    )


def delivery(plan_id: str, ratio: float = 0.5, reason: str = "") -> Delivery:
    """A plan that takes `ratio` times as long as the unquantized model, or cannot be used for a reason."""
    failed = Delivery(plan_id=plan_id, loop="generate", where="new process", reason=reason)
    if reason:
        return failed
    return replace(
        failed,
        times=RunTimes(request_ms=400 * ratio, first_token_ms=100 * ratio, step_ms=2 * ratio),
        original_times=RunTimes(request_ms=400.0, first_token_ms=100.0, step_ms=2.0),
        ratio=Interval(value=ratio, low=ratio - 0.01, high=ratio + 0.01),
    )


@pytest.fixture
def deliver(database):
    """Keep deliveries in the database."""

    def keep(*deliveries: Delivery) -> None:
        store = open_store(database)
        for each in deliveries:
            store.put_delivery(each)
        store.close()

    return keep


def recording() -> Recording:
    sites = tuple(
        Site(
            name=choice.name,
            parameters=(f"{choice.name}.weight",),
            shape=choice.shape,
            uses=(SiteUse(phase="prefill", m=512, calls=1), SiteUse(phase="decode", m=1, calls=1)),
        )
        for choice in plan("x", "x", "front", ("bf16",), 1.0).layers
    )
    skipped = tuple(
        Skipped(
            name=f"model.layers.{block}.conv", numel=1000, share=0.002, reason="not a linear layer"
        )
        for block in range(BLOCKS)
    )
    return Recording(
        sites=sites,
        skipped=skipped,
        weights_share=0.94,
        flops_share={"prefill": 0.91, "decode": 0.97},
        parameter_bytes=2**25,
    )


def fill(store: Store, limits: dict[str, float | None]) -> None:
    store.put_device(DEVICE)
    store.put_model(MODEL_HASH, {"kind": "huggingface", "path": "/somewhere/tiny-model"})
    store.put_study(
        STUDY,
        model_hash=MODEL_HASH,
        device=DEVICE,
        identity={},
        workload=Workload.parse("prefill=512,decode=128"),
        limits=limits,
    )
    store.update_study(STUDY, recording=recording(), complete=True)
    store.put_plan(plan(ORIGINAL, "original", "original", ("bf16",), 198.0))
    store.put_plan(plan(UNIFORM, "uniform int8-row", "uniform", ("int8-row",), 150.0))
    store.put_plan(plan(MIXED, "front 1", "front", ("int8-row", "int8-row", "bf16"), 140.0))
    store.put_plan(plan(SMALL, "front 2", "front", ("int4-g32",), 120.0))
    store.put_plan(plan(UNPROVEN, "refined 1", "refined", ("int4-g128",), 110.0))
    store.put_proof(ORIGINAL, proof(ORIGINAL, 200.0, 0.0, 2**25, half=0.0))
    store.put_proof(UNIFORM, proof(UNIFORM, 152.0, 0.006, 2**24))
    store.put_proof(MIXED, proof(MIXED, 125.0, 0.004, 2**24 + 2**22))
    store.put_proof(SMALL, proof(SMALL, 100.0, 0.03, 2**23))
    store.put_proof(UNPROVEN, None, "the kernel failed")


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database that each test gets a copy of: a copy takes a hundredth of the time."""
    path = tmp_path_factory.mktemp("filled") / "plan.db"
    store = open_store(path)
    fill(store, {"max_ppl_increase": 0.01, "max_memory_bytes": None})
    store.close()
    return path


@pytest.fixture
def database(filled: Path, tmp_path: Path) -> Path:
    """A finished search with a limit of 1 %: `MIXED` is the recommended plan."""
    return Path(shutil.copy(filled, tmp_path / "plan.db"))


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture
def driver(monkeypatch, database):
    """A stand-in for `autoquant.tuner.driver`, whose `calls` are the keyword arguments it got."""
    module = ModuleType("autoquant.tuner.driver")
    module.calls = []
    module.error = None

    def search(model, **options):
        module.calls.append({"model": model, **options})
        listener = options["listener"]
        listener(StageStarted("timing", 2))
        listener(StageProgress("timing", 1, "int8-row at m=1"))
        listener(Notice("a layer was left alone"))
        listener(StageFinished("timing", "2 timings"))
        if module.error is not None:
            raise module.error
        return Study.open(database)

    module.search = search
    monkeypatch.setitem(sys.modules, "autoquant.tuner.driver", module)
    monkeypatch.setattr(autoquant.tuner, "driver", module, raising=False)
    return module
