"""A small finished search with timings, made up, in a database.

Names and reasons are such as would break a careless page.
"""

from __future__ import annotations

from dataclasses import replace

from autoquant.records import LinearShape, Roofline, RouteStep, RunTimes, Skipped, Workload

from . import records
from .records import (
    ALWAYS_MATMUL,
    STUDY,
    make_choice,
    make_device,
    make_measurement,
    make_recording,
    make_site,
    make_subject,
    put_study,
)

PROTOCOL = "3"
MODEL_PATH = "/somewhere/<b>tiny"
EVIL = '</script><script>window.broken = 1</script><img src="x" onerror="window.broken = 1">'
DEVICE = make_device(name="Test & Co CPU", capability="", versions={"torch": "2.13"})
WORKLOAD = Workload.parse("prefill=64,decode=16")
PLAIN, INT8, INT4 = "bfloat16/plain", "int8-row/plain", "int4-g64/packed"
INT4_SMALL = f"int4-g128/{EVIL}"
ATTENTION = LinearShape(n=256, k=256, bias=False, dtype="bfloat16")
MLP = LinearShape(n=256, k=1024, bias=True, dtype="bfloat16")
FUSED = LinearShape(n=768, k=256, bias=False, dtype="bfloat16")
ROUTED = (RouteStep(upper_m=16, kernel="weight-only"), RouteStep(upper_m=None, kernel="integer"))
NOISE = "measured while others used 40% of the machine"
LEFT_ALONE = f"costs too much {EVIL}"
ORIGINAL, UNIFORM, FRONT, FAST, FAR, UNPROVEN = (letter * 8 for letter in "abcdef")
# Label, kind, request ms as predicted and as measured, increase, share of the memory, format by
# type of layer.
PLANS = {
    ORIGINAL: ("original", "original", 100.0, 101.0, 0.0, 1.0, {}),
    UNIFORM: ("uniform int8-row", "uniform", 60.0, 66.0, 0.004, 0.5, {"q_proj": INT8,
    "down_proj": INT8}),
    FRONT: ("front 1", "front", 50.0, 50.0, 0.005, 0.4, {"q_proj": INT4, "down_proj": INT8}),
    FAST: ("front 2", "front", 45.0, 44.0, 0.02, 0.3, {"q_proj": INT4, "down_proj": INT4}),
    FAR: ("front 3", "front", 43.0, 43.0, 9.0, 0.2, {"q_proj": INT4_SMALL,
    "down_proj": INT4_SMALL}),
}  # fmt: skip


def choice(name, fmt, number):
    shape = ATTENTION if name.endswith(("q_proj", "head")) else MLP
    quantized = fmt != PLAIN
    return make_choice(
        name,
        fmt,
        shape=shape,
        route=ROUTED if quantized else ALWAYS_MATMUL,
        numerics=f"{fmt}+a16",
        latency_us={"prefill": 100.0 if quantized else 200.0, "decode": 50.0 + number},
        memory_bytes=shape.n * shape.k * (1 if quantized else 2),
        loss=0.001 * (number + 1) if quantized else 0.0,
        reason="fast enough" if quantized else LEFT_ALONE,
    )


def make_plan(plan_id, blocks):
    label, kind, predicted, _, _, share, formats = PLANS[plan_id]
    names = [
        f"model.layers.{block}.{part}"
        for block in range(blocks)
        for part in ("attn.q_proj", "mlp.down_proj")
    ]
    layers = [
        choice(name, formats.get(name.rpartition(".")[2], PLAIN), n % 2)
        for n, name in enumerate(names)
    ]
    layers.append(choice("lm_head", PLAIN, 0))
    prediction = {
        "request_ms": predicted,
        "linear_ms": 20.0,
        "loss": sum(layer.loss for layer in layers),
        "memory_bytes": int(share * 2**20),
    }
    return records.make_plan(plan_id, layers, prediction, label=label, kind=kind)


def make_proof(plan_id):
    _, _, _, measured, increase, share, _ = PLANS[plan_id]
    return records.make_shown_proof(
        plan_id,
        measured,
        increase,
        parts={"prefill": 10, "decode": 20},
        original_ms=101.0,
        original_phase_ms={"prefill": 10.0, "decode": 5.0},
        half=0.001 if increase else 0.0,
        memory_bytes=int(share * 2**20),
        notes=(f"a note {EVIL}",),
    )


def make_delivery(plan_id, ratio):
    """A delivery of a plan that takes `ratio` times as long as the unquantized model."""
    original = RunTimes(request_ms=200.0, first_token_ms=50.0, step_ms=10.0)
    return records.make_delivery(plan_id, ratio, original=original)


def recording(plan):
    return make_recording(
        [
            make_site(layer.name, (64, 1), parameters=layer.parameters, shape=layer.shape)
            for layer in plan.layers
        ],
        skipped=(Skipped(name=f"conv{EVIL}", numel=1000, share=0.06, reason="not a linear layer"),),
    )


def timings(working_set_bytes, factor=1.0):
    """Of three shapes at three m: bfloat16, int8 by two kernels, and one that failed."""
    found = []
    for shape in (ATTENTION, MLP, FUSED):
        for m in (1, 64, 512):
            subject = make_subject(shape=shape, m=m, working_set_bytes=working_set_bytes)
            for fmt, kernel, base in (
                (PLAIN, "matmul", 40.0),
                (INT8, "weight-only", 10.0),
                (INT8, "integer", 20.0),
            ):
                a_row = 0.5 if kernel == "weight-only" else 0.1
                time_us = factor * (base + m * a_row) * shape.n / 256
                own = replace(subject, format=fmt, kernel=kernel)
                found.append(
                    make_measurement(own, samples_us=(time_us,), relative_error=0.001, reason=NOISE)
                )
            own = replace(subject, format="float8-row/plain", kernel="scaled-mm")
            found.append(make_measurement(own, "failed", reason=f"the kernel failed {EVIL}"))
    return found


def fill(store, *, blocks=4, limits=None, timed=True, plans=tuple(PLANS), complete=True):
    """Keep the study and `plans` of it; with a limit of 1 % `FRONT` is the recommended one."""
    put_study(
        store,
        device=DEVICE,
        source={"kind": "huggingface", "path": MODEL_PATH},
        identity={
            "protocol": PROTOCOL, "quality": "k3y", "dtype": "bfloat16", "method": "isolated-1",
            "seed": 7,
            "candidates": ["int8-row/plain/weight-only", "int8-row/plain/integer"],
        },
        workload=WORKLOAD,
        **({} if limits is None else {"limits": limits}),
    )  # fmt: skip
    store.update_study(STUDY, recording=recording(make_plan(ORIGINAL, blocks)), complete=complete)
    for plan_id in plans:
        store.put_plan(make_plan(plan_id, blocks))
        store.put_proof(plan_id, make_proof(plan_id))
    store.put_plan(
        replace(make_plan(FAST, blocks), plan_id=UNPROVEN, label="refined 1", kind="refined")
    )
    store.put_proof(UNPROVEN, None, f"the compiler failed {EVIL}")
    if timed:
        store.put_timings(DEVICE, PROTOCOL, timings(2**24))
        store.put_timings(
            DEVICE, PROTOCOL, timings(2**20, factor=100.0)[:4]
        )  # as another model left them
        store.put_timings(DEVICE, "2", timings(2**24, factor=0.001))  # of an older protocol
        store.put_roofline(
            DEVICE,
            Roofline(
                bandwidth_bytes_per_s=5e10,
                flops_per_s={"bfloat16": 3e11, "float32": 1e11, "int8": 6e11},
            ),
        )
