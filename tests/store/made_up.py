"""Made-up records, as rich as they come."""

from __future__ import annotations

import math

from autoquant.records import (
    Delivery,
    Device,
    Interval,
    LayerChoice,
    LinearShape,
    Measurement,
    Plan,
    Prediction,
    Proof,
    Recording,
    RouteStep,
    RunTimes,
    Site,
    SiteUse,
    Skipped,
    TaskScore,
    TimingSubject,
    Workload,
)

DEVICE = Device(
    type="cpu",
    name="Test CPU",
    capability="avx2",
    threads=2,
    cache_bytes=2**24,
    versions={"torch": "2"},
)
SHAPE = LinearShape(n=64, k=32, bias=True, dtype="bfloat16")
STUDY = "5tudy001"
MODEL = "m0del"
WORKLOAD = Workload.parse("prefill=8,decode=4", 3)


def measurement(m=1, kernel="matmul", latency=10.0, **changes):
    subject = TimingSubject(
        shape=SHAPE, m=m, format="bfloat16/plain", kernel=kernel, working_set_bytes=2**20
    )
    samples = (
        {}
        if changes.get("outcome", "ok") != "ok"
        else {"samples_us": (latency, latency + 1, latency + 0.125)}
    )
    return Measurement(
        subject=subject, **({"outcome": "ok", "relative_error": 0.001} | samples | changes)
    )


def recording():
    site = Site(
        name="head",
        parameters=("head.weight", "other.weight"),
        shape=SHAPE,
        uses=(SiteUse(phase="prefill", m=8, calls=1), SiteUse(phase="decode", m=1, calls=2)),
        kept=("embedding.weight",),
        siblings=("head", "tail"),
    )
    skipped = Skipped(name="conv", numel=10, share=0.25, reason="not a linear")
    return Recording(
        sites=(site,),
        skipped=(skipped,),
        weights_share=0.5,
        flops_share={"prefill": 0.75},
        parameter_bytes=4096,
    )


def plan(plan_id="abcd0001", study_id=STUDY, **changes):
    layer = LayerChoice(
        name="head",
        shape=SHAPE,
        format="int8-row/plain",
        route=(
            RouteStep(upper_m=2, kernel="weight-only"),
            RouteStep(upper_m=None, kernel="int-mm"),
        ),
        numerics="int8-row+a8-row",
        latency_us={"prefill": 0.1 + 0.2, "decode": 1 / 3},
        memory_bytes=2048,
        loss=1e-17,
        parameters=("head.weight", "other.weight"),
        reason="größer ≠ \"better\"; it's\n'so'",
    )
    prediction = Prediction(request_ms=1.5, linear_ms=1.25, loss=1e-17, memory_bytes=2**40 + 1)
    values = {
        "label": "front 1",
        "kind": "front",
        "model_hash": MODEL,
        "dtype": "bfloat16",
        "layers": (layer,),
    }
    return Plan(plan_id=plan_id, study_id=study_id, prediction=prediction, **(values | changes))


def proof(plan_id="abcd0001", **changes):
    values = {
        "request_ms": 1 / 3,
        "phase_ms": {"prefill": 0.1},
        "original_request_ms": 2.0,
        "original_phase_ms": {"prefill": 0.2},
        "perplexity": 20.5,
        "loss": math.pi,
        "increase": Interval(value=0.001, low=-0.5, high=math.inf),
        "selection_increase": Interval(value=0.002, low=0.001, high=0.003),
        "kl": None,
        "memory_bytes": 2**40 + 1,
        "execution": "eager",
        "notes": ("timed while others used 30% of the machine", "two"),
    }
    return Proof(plan_id=plan_id, **(values | changes))


def delivery(plan_id="abcd0001", **changes):
    values = {
        "loop": "generate",
        "where": "new process",
        "times": RunTimes(request_ms=1 / 3, first_token_ms=0.1, step_ms=1e-3),
        "original_times": RunTimes(request_ms=2 / 3, first_token_ms=0.2, step_ms=2e-3),
        "ratio": Interval(value=0.5, low=0.4, high=math.inf),
        "logits_error": 0.0,
        "notes": ("timed while others used 30% of the machine", "two"),
    }
    return Delivery(plan_id=plan_id, **(values | changes))


def task_score(value=0.5):
    return TaskScore(
        task="arc",
        metric="acc",
        value=value,
        stderr=0.01,
        samples=200,
        limit=200,
        lm_eval_version="0.4.13",
    )


def fill(store, study_id=STUDY):
    """A device, a model and a study."""
    store.put_device(DEVICE)
    store.put_model(MODEL, {"kind": "live", "path": ""})
    store.put_study(
        study_id,
        model_hash=MODEL,
        device=DEVICE,
        identity={"seed": 0},
        workload=WORKLOAD,
        limits={"max_ppl_increase": 0.01, "max_memory_bytes": None},
    )
