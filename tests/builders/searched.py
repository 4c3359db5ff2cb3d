"""A finished search of a model of 30 blocks, made up, in a database. Commands show it."""

from __future__ import annotations

from autoquant.records import LinearShape, RouteStep, RunTimes, Skipped, Workload

from . import records
from .records import make_choice, make_device, make_recording, make_site, put_study

STUDY = "5tudy0000001"
ORIGINAL, UNIFORM, MIXED, SMALL, UNPROVEN = (
    "aaaa00000001", "bbbb00000002", "cccc00000003", "dddd00000004", "eeee00000005",
)  # fmt: skip
BLOCKS = 30
SHAPES = {"q_proj": (256, 256), "up_proj": (1024, 256), "down_proj": (256, 1024)}
ROUTED = (RouteStep(upper_m=16, kernel="weight-only"), RouteStep(upper_m=None, kernel="dynamic"))
PLAIN = (RouteStep(upper_m=None, kernel="torch"),)
DEVICE = make_device(versions={"torch": "2.13"})
FAST_ENOUGH = "fastest within the limit"
LEFT_ALONE = "quantizing it costs more quality than it saves time"


def layer(name, shape, fmt):
    quantized = fmt != "bf16"
    return make_choice(
        name,
        fmt,
        shape=LinearShape(n=shape[0], k=shape[1], bias=False, dtype="bf16"),
        route=ROUTED if quantized else PLAIN,
        numerics=f"{fmt}:a16",
        latency_us={"prefill": 120.0, "decode": 35.5},
        memory_bytes=shape[0] * shape[1] * (1 if quantized else 2),
        loss=0.0001 if quantized else 0.0,
        reason=FAST_ENOUGH if quantized else LEFT_ALONE,
    )


def layers(formats):
    """Those of every block, whose formats take turns."""
    return [
        layer(f"model.layers.{block}.{role}", shape, formats[block % len(formats)])
        for block in range(BLOCKS)
        for role, shape in SHAPES.items()
    ]


def plan(plan_id, label, kind, formats, request_ms):
    made = layers(formats)
    prediction = {
        "request_ms": request_ms,
        "linear_ms": request_ms * 0.8,
        "loss": 0.001,
        "memory_bytes": sum(choice.memory_bytes for choice in made),
    }
    about = {"study_id": STUDY, "dtype": "bf16", "label": label, "kind": kind}
    return records.make_plan(plan_id, made, prediction, **about)


def proof(plan_id, request_ms, increase, memory_bytes, half=0.001):
    return records.make_shown_proof(
        plan_id,
        request_ms,
        increase,
        parts={"prefill": 4, "decode": 100},
        original_ms=200.0,
        original_phase_ms={"prefill": 50.0, "decode": 2.0},
        half=half,
        memory_bytes=memory_bytes,
        notes=("timed once only",),
    )


def delivery(plan_id, ratio=0.5, reason=""):
    """A plan that takes `ratio` times as long as the unquantized model, or cannot be used for a reason."""
    if reason:
        return records.fail_delivery(plan_id, reason)
    original = RunTimes(request_ms=400.0, first_token_ms=100.0, step_ms=2.0)
    return records.make_delivery(plan_id, ratio, original=original)


def recording():
    return make_recording(
        [make_site(choice.name, (512, 1), shape=choice.shape) for choice in layers(("bf16",))],
        skipped=tuple(
            Skipped(
                name=f"model.layers.{block}.conv",
                numel=1000,
                share=0.002,
                reason="not a linear layer",
            )
            for block in range(BLOCKS)
        ),
        parameter_bytes=2**25,
    )


def fill(store, limits):
    put_study(
        store,
        STUDY,
        device=DEVICE,
        source={"kind": "huggingface", "path": "/somewhere/tiny-model"},
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
