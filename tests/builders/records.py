"""A builder for each record. What a test does not name is filled in."""

from __future__ import annotations

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
    TimingSubject,
    Workload,
)

STUDY, MODEL = "5tudy001", "m0del"
WORKLOAD = Workload.parse("prefill=8,decode=4")
SHAPE = LinearShape(n=64, k=64, bias=False, dtype="bfloat16")
ALWAYS_MATMUL = (RouteStep(upper_m=None, kernel="matmul"),)


def make_device(**changes):
    values = {"type": "cpu", "name": "Test CPU", "capability": "avx2", "threads": 2}
    return Device(**(values | {"cache_bytes": 2**24, "versions": {}} | changes))


DEVICE = make_device()


def make_subject(**changes):
    values = {"shape": SHAPE, "m": 1, "format": "bfloat16/plain", "kernel": "matmul"}
    return TimingSubject(**(values | {"working_set_bytes": 1 << 20} | changes))


def make_measurement(subject, outcome="ok", **changes):
    return Measurement(subject=subject, outcome=outcome, **changes)


def make_site(name="layer", rows=(8, 1), **changes):
    """A site that is used once in prefill and once in each decode step."""
    phases = ("prefill", "decode")
    uses = tuple(SiteUse(phase=phase, m=m, calls=1) for phase, m in zip(phases, rows, strict=False))
    values = {"parameters": (f"{name}.weight",), "shape": SHAPE, "uses": uses}
    return Site(name=name, **(values | changes))


def make_recording(sites, **changes):
    values = {"skipped": (), "weights_share": 0.94, "parameter_bytes": 2**20}
    values |= {"flops_share": {"prefill": 0.91, "decode": 0.97}}
    return Recording(sites=tuple(sites), **(values | changes))


def make_choice(name="layer", fmt="bfloat16/plain", **changes):
    values = {
        "shape": SHAPE,
        "route": ALWAYS_MATMUL,
        "numerics": f"{fmt.partition('/')[0]}+a16",
        "latency_us": {"prefill": 1000.0, "decode": 0.0},
        "memory_bytes": 100,
        "loss": 0.0,
        "parameters": (f"{name}.weight",),
    }
    return LayerChoice(name=name, format=fmt, **(values | changes))


def make_plan(plan_id="abcd0001", layers=None, predicted=(), **changes):
    """A plan of one layer.

    Args:
        predicted: What its prediction has otherwise.
    """
    prediction = {"request_ms": 5.0, "linear_ms": 3.0, "loss": 0.01, "memory_bytes": 100}
    values = {
        "study_id": STUDY,
        "label": "front 1",
        "kind": "front",
        "model_hash": MODEL,
        "dtype": "bfloat16",
        "prediction": Prediction(**(prediction | dict(predicted))),
    }
    layers = (make_choice(),) if layers is None else tuple(layers)
    return Plan(plan_id=plan_id, layers=layers, **(values | changes))


def around(value, half=0.001):
    """The interval of this value, with ends so far away."""
    return Interval(value=value, low=value - half, high=value + half)


def make_proof(plan_id="abcd0001", ms=10.0, original_ms=20.0, increase=0.0, half=0.001, **changes):
    values = {
        "phase_ms": {"prefill": ms},
        "original_phase_ms": {"prefill": original_ms},
        "perplexity": 10 * (1 + increase),
        "loss": 2.3,
        "increase": around(increase, half),
        "selection_increase": around(increase, half),
        "kl": abs(increase),
        "memory_bytes": 100,
    }
    return Proof(
        plan_id=plan_id, request_ms=ms, original_request_ms=original_ms, **(values | changes)
    )


def make_shown_proof(plan_id, ms, increase, *, parts, **changes):
    """A proof with a number for all that is shown of one.

    Args:
        parts: By phase, the part of a request's time that it takes: 4 for a quarter.
    """
    values = {
        "phase_ms": {phase: ms / part for phase, part in parts.items()},
        "perplexity": 20 * (1 + increase),
        "loss": 3.0 * (1 + increase),
        "kl": abs(increase) / 2,
    }
    return make_proof(plan_id, ms, increase=increase, **(values | changes))


def make_delivery(plan_id="abcd0001", ratio=0.5, half=0.01, original=None, **changes):
    """A delivery of a plan that takes `ratio` times as long as the unquantized model.

    Args:
        original: The times of that, if they matter.
    """
    original = original or RunTimes(request_ms=10.0, first_token_ms=4.0, step_ms=2.0)
    values = {
        "loop": "generate",
        "where": "new process",
        "times": RunTimes(
            request_ms=original.request_ms * ratio,
            first_token_ms=original.first_token_ms * ratio,
            step_ms=original.step_ms * ratio,
        ),
        "original_times": original,
        "ratio": around(ratio, half),
        "logits_error": 0.0,
    }
    return Delivery(plan_id=plan_id, **(values | changes))


def fail_delivery(plan_id, reason="it cannot be loaded"):
    return Delivery(plan_id=plan_id, loop="generate", where="new process", reason=reason)


def put_study(store, study_id=STUDY, *, model=MODEL, device=DEVICE, source=None, **changes):
    """Keep a device, a model and a study of it without plans."""
    values = {
        "identity": {},
        "workload": WORKLOAD,
        "limits": {"max_ppl_increase": 0.01, "max_memory_bytes": None},
    }
    store.put_device(device)
    store.put_model(model, source or {"kind": "live", "path": ""})
    store.put_study(study_id, model_hash=model, device=device, **(values | changes))
