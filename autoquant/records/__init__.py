"""The records that every other module speaks in, as frozen dataclasses.

They need neither torch nor a database. Units are part of the names: `_us` microseconds, `_ms`
milliseconds, `_bytes` bytes. A loss is a mean Kullback-Leibler divergence per token, in nats,
unless the user gives a quality function.
"""

from autoquant.records.plans import (
    BASELINES,
    ORIGINAL_LABEL,
    LayerChoice,
    Numerics,
    Objective,
    Plan,
    PlanKind,
    Prediction,
    Route,
    RouteStep,
    route_kernel,
)
from autoquant.records.proofs import (
    DISTURBED,
    STAND_IN,
    Delivery,
    Interval,
    Loop,
    Measure,
    Proof,
    RunTimes,
    TaskScore,
    Where,
)
from autoquant.records.timings import (
    Device,
    LinearShape,
    Measurement,
    Outcome,
    Roofline,
    TimingSubject,
    content_key,
)
from autoquant.records.workloads import (
    Phase,
    Recording,
    Site,
    SiteUse,
    Skipped,
    Workload,
    request_time,
)

__all__ = [
    "BASELINES",
    "DISTURBED",
    "ORIGINAL_LABEL",
    "STAND_IN",
    "Delivery",
    "Device",
    "Interval",
    "LayerChoice",
    "LinearShape",
    "Loop",
    "Measure",
    "Measurement",
    "Numerics",
    "Objective",
    "Outcome",
    "Phase",
    "Plan",
    "PlanKind",
    "Prediction",
    "Proof",
    "Recording",
    "Roofline",
    "Route",
    "RouteStep",
    "RunTimes",
    "Site",
    "SiteUse",
    "Skipped",
    "TaskScore",
    "TimingSubject",
    "Where",
    "Workload",
    "content_key",
    "request_time",
    "route_kernel",
]
