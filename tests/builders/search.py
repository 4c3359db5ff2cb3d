"""Timings, choices and proofs with numbers of the test's choosing, for the search and the solver."""

from __future__ import annotations

from autoquant.candidates import Format, Kernel
from autoquant.records import Interval, RouteStep
from autoquant.solver.planning import PlanContext
from autoquant.tuner.choices import FormatFacts

from . import records
from .records import MODEL, SHAPE, STUDY, WORKLOAD, make_choice, make_measurement, make_subject

WORKING_SET = make_subject().working_set_bytes
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


def timings(table):
    """Measurements from {(format, kernel, m): microseconds, or the reason why there are none}."""
    measured = {}
    for (fmt, kernel, m), value in table.items():
        subject = make_subject(m=m, format=fmt, kernel=kernel)
        if isinstance(value, str):
            outcome, _, reason = value.partition(": ")
            # What was measured before it failed must not count: it would be the fastest of all.
            measured[subject] = make_measurement(
                subject, outcome, reason=reason, samples_us=(0.001,)
            )
        else:
            measured[subject] = make_measurement(subject, samples_us=(float(value),))
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
    **changes,
):
    """A choice that takes `us` microseconds in prefill and nothing in decode."""
    return make_choice(
        name,
        fmt,
        route=(RouteStep(upper_m=None, kernel=kernel),),
        latency_us={"prefill": us, "decode": 0.0},
        memory_bytes=memory,
        loss=loss,
        **changes,
    )


def make_plan(plan_id, label="front 1", kind="front", layers=None, **predicted):
    return records.make_plan(plan_id, label=label, kind=kind, predicted=predicted, layers=layers)


def make_proof(plan_id, high=None, memory=100, increase=0.0, **changes):
    """A proof whose selection interval ends at `high` (the increase itself where left out)."""
    half = 0.0 if high is None else high - increase
    selection = Interval(value=increase, low=increase - half, high=increase + half)
    values = {"selection_increase": selection, "memory_bytes": memory} | changes
    return records.make_proof(plan_id, increase=increase, **values)
