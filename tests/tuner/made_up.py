"""Made-up sites, timings, choices, plans and proofs with numbers of the test's choosing."""

from __future__ import annotations

from autoquant.candidates import Format, Kernel
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
    RouteStep,
    RunTimes,
    Site,
    SiteUse,
    TimingSubject,
    Workload,
)
from autoquant.solver.planning import PlanContext
from autoquant.tuner.choices import FormatFacts

WORKING_SET = 1 << 20
SHAPE = LinearShape(n=64, k=64, bias=False, dtype="bfloat16")
WORKLOAD = Workload.parse("prefill=8,decode=4")
STUDY, MODEL = "5tudy001", "m0del"
DEVICE = Device(
    type="cpu", name="Test CPU", capability="avx2", threads=2, cache_bytes=2**24, versions={}
)
CONTEXT = PlanContext(
    study_id=STUDY,
    model_hash=MODEL,
    dtype="bfloat16",
    workload=WORKLOAD,
    other_bytes=1000,
    rest_ms=2.0,
)


def make_format(format_id, **kernels):
    """A format whose kernels are named with their numerics; it is never run."""
    return Format(
        id=format_id,
        quantize=lambda weight: weight,
        dequantize=lambda stored: stored,
        kernels=tuple(
            Kernel(id=name.replace("_", "-"), numerics=numerics, linear=lambda x, w, b: x)
            for name, numerics in kernels.items()
        ),
    )


ORIGINAL = make_format("bfloat16/plain", matmul="a16")
INT8 = make_format("int8/plain", weight_only="a16", integer="a8-row")


def make_site(name="layer", rows=(8, 1), **changes):
    """A site that is used once in prefill and once in each decode step."""
    phases = ("prefill", "decode")
    uses = tuple(SiteUse(phase=phase, m=m, calls=1) for phase, m in zip(phases, rows, strict=False))
    return Site(
        name=name, parameters=(f"{name}.weight",), shape=SHAPE, **({"uses": uses} | changes)
    )


def timings(table):
    """Measurements from {(format, kernel, m): microseconds, or the reason why there are none}."""
    measured = {}
    for (fmt, kernel, m), value in table.items():
        subject = TimingSubject(
            shape=SHAPE, m=m, format=fmt, kernel=kernel, working_set_bytes=WORKING_SET
        )
        if isinstance(value, str):
            outcome, _, reason = value.partition(": ")
            # What was measured before it failed must not count: it would be the fastest of all.
            measured[subject] = Measurement(
                subject=subject, outcome=outcome, reason=reason, samples_us=(0.001,)
            )
        else:
            measured[subject] = Measurement(
                subject=subject, outcome="ok", samples_us=(float(value),)
            )
    return measured


def facts(**by_values):
    """Bytes and error by format, written as `int8=(bytes, error)` for the format `int8/plain`."""
    return {(f"{values}/plain", SHAPE): FormatFacts(*pair) for values, pair in by_values.items()}


def choice(
    name="layer",
    fmt="bfloat16/plain",
    us=1000.0,
    loss=0.0,
    memory=100,
    kernel="matmul",
    numerics=None,
):
    """A choice that takes `us` microseconds in prefill and nothing in decode."""
    return LayerChoice(
        name=name,
        shape=SHAPE,
        format=fmt,
        route=(RouteStep(upper_m=None, kernel=kernel),),
        numerics=numerics or f"{fmt.partition('/')[0]}+a16",
        latency_us={"prefill": us, "decode": 0.0},
        memory_bytes=memory,
        loss=loss,
        parameters=(f"{name}.weight",),
    )


def make_plan(plan_id, label="front 1", kind="front", loss=0.01, **prediction):
    values = {"request_ms": 5.0, "linear_ms": 3.0, "loss": loss, "memory_bytes": 100}
    return Plan(
        plan_id=plan_id,
        study_id=STUDY,
        label=label,
        kind=kind,
        model_hash=MODEL,
        dtype="bfloat16",
        layers=(choice(),),
        prediction=Prediction(**(values | prediction)),
    )


def make_proof(
    plan_id, ms=10.0, original_ms=20.0, increase=0.0, high=None, memory=100, perplexity=None
):
    """A proof whose selection interval ends at `high` (the increase itself where left out)."""
    high = increase if high is None else high
    return Proof(
        plan_id=plan_id,
        request_ms=ms,
        phase_ms={"prefill": ms},
        original_request_ms=original_ms,
        original_phase_ms={"prefill": original_ms},
        perplexity=10 * (1 + increase) if perplexity is None else perplexity,
        loss=2.3,
        increase=Interval(value=increase, low=increase - 0.001, high=increase + 0.001),
        selection_increase=Interval(value=increase, low=increase - (high - increase), high=high),
        kl=abs(increase),
        memory_bytes=memory,
    )


def make_delivery(plan_id, ratio=0.5, half=0.01, **changes):
    """A delivery of a plan that takes `ratio` times as long as the unquantized model."""
    values = {
        "loop": "generate",
        "where": "new process",
        "times": RunTimes(request_ms=10 * ratio, first_token_ms=4 * ratio, step_ms=2 * ratio),
        "original_times": RunTimes(request_ms=10.0, first_token_ms=4.0, step_ms=2.0),
        "ratio": Interval(value=ratio, low=ratio - half, high=ratio + half),
        "logits_error": 0.0,
    }
    return Delivery(plan_id=plan_id, **(values | changes))


def fail_delivery(plan_id, reason="it cannot be loaded"):
    return Delivery(plan_id=plan_id, loop="generate", where="new process", reason=reason)


def fill(store):
    """A device, a model and a study without plans."""
    store.put_device(DEVICE)
    store.put_model(MODEL, {"kind": "live", "path": ""})
    limits = {"max_ppl_increase": 0.01, "max_memory_bytes": None}
    store.put_study(
        STUDY, model_hash=MODEL, device=DEVICE, identity={}, workload=WORKLOAD, limits=limits
    )
