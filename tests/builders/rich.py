"""Records with as much in them as can be, for the store to bring back unchanged."""

from __future__ import annotations

import math
from dataclasses import replace

from autoquant.records import (
    Interval,
    LinearShape,
    Prediction,
    RouteStep,
    RunTimes,
    SiteUse,
    Skipped,
    TaskScore,
    Workload,
)

from .records import (
    STUDY,
    make_choice,
    make_delivery,
    make_device,
    make_measurement,
    make_plan,
    make_proof,
    make_recording,
    make_site,
    make_subject,
    put_study,
)

DEVICE = make_device(versions={"torch": "2"})
SHAPE = LinearShape(n=64, k=32, bias=True, dtype="bfloat16")
WORKLOAD = Workload.parse("prefill=8,decode=4", 3)
NOTES = ("timed while others used 30% of the machine", "two")


def measurement(m=1, kernel="matmul", latency=10.0, outcome="ok", **changes):
    subject = make_subject(shape=SHAPE, m=m, kernel=kernel)
    values = {"relative_error": 0.001}
    if outcome == "ok":
        values["samples_us"] = (latency, latency + 1, latency + 0.125)
    return make_measurement(subject, outcome, **(values | changes))


def recording():
    site = make_site(
        "head",
        parameters=("head.weight", "other.weight"),
        shape=SHAPE,
        uses=(SiteUse(phase="prefill", m=8, calls=1), SiteUse(phase="decode", m=1, calls=2)),
        kept=("embedding.weight",),
        siblings=("head", "tail"),
    )
    return make_recording(
        [site],
        skipped=(Skipped(name="conv", numel=10, share=0.25, reason="not a linear"),),
        weights_share=0.5,
        flops_share={"prefill": 0.75},
        parameter_bytes=4096,
    )


def plan(plan_id="abcd0001", study_id=STUDY, **changes):
    layer = make_choice(
        "head",
        "int8-row/plain",
        shape=SHAPE,
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
    values = {"layers": [layer], "prediction": prediction} | changes
    return make_plan(plan_id, study_id=study_id, **values)


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
        "notes": NOTES,
    }
    return replace(make_proof(plan_id), **(values | changes))


def delivery(plan_id="abcd0001", **changes):
    values = {
        "times": RunTimes(request_ms=1 / 3, first_token_ms=0.1, step_ms=1e-3),
        "original_times": RunTimes(request_ms=2 / 3, first_token_ms=0.2, step_ms=2e-3),
        "ratio": Interval(value=0.5, low=0.4, high=math.inf),
        "notes": NOTES,
    }
    return replace(make_delivery(plan_id), **(values | changes))


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
    put_study(store, study_id, device=DEVICE, identity={"seed": 0}, workload=WORKLOAD)
