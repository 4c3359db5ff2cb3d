"""Latencies of two linears, made up.

What each candidate takes is its entry in `TIMES` times the shape's share.
"""

from __future__ import annotations

from autoquant.profiler.latencies import Latencies
from autoquant.records import LinearShape, Roofline

from .records import make_device

DEVICE = make_device(capability="", cache_bytes=1)
ROOFLINE = Roofline(
    bandwidth_bytes_per_s=5e10, flops_per_s={"bfloat16": 3e11, "float32": 1e11, "int8": 6e11}
)
SHAPES = {
    LinearShape(n=512, k=256, bias=False, dtype="bfloat16"): (
        "model.layers.0.q_proj",
        "model.layers.1.q_proj",
    ),
    LinearShape(n=1024, k=256, bias=True, dtype="bfloat16"): (),
}
ROWS = (1, 4, 512)
WIDER = "float32 is wider than the model's bfloat16"
TIMES = {
    ("bfloat16/plain", "matmul"): (30.0, 32.0, 400.0),
    ("float32/plain", "matmul"): (WIDER, WIDER, WIDER),
    ("int8-row/plain", "int8pack-mm"): (10.0, 20.0, 1600.0),
    ("int8-row/plain", "int-mm"): ("bounded: cannot win", 25.0, 200.0),
    ("int8-row/plain", "dynamic"): ("incorrect: relative error 3", 40.0, 440.0),
    ("int4-g32/packed", "packed-mm"): (12.0, 30.0, 9000.0),
    ("float8-row/plain", "dequantize-matmul"): (60.0, 64.0, 800.0),
    ("int4-g64/packed", "packed-mm"): (
        "failed: no compiler",
        "failed: no compiler",
        "failed: no compiler",
    ),
}


def row(shape, m, candidate, value):
    timed = isinstance(value, float)
    outcome, colon, reason = ("ok", "", "") if timed else value.partition(":")
    if not timed and not colon:
        outcome, reason = "unsupported", value
    return {
        "n": shape.n, "k": shape.k, "bias": shape.bias, "dtype": shape.dtype, "m": m,
        "format": candidate[0], "kernel": candidate[1], "numerics": "a16", "outcome": outcome,
        "latency_us": value * shape.n / 512 if timed else None, "spread_us": 0.5 if timed else None,
        "relative_error": 0.001 if timed else None, "floor_us": 2.0, "reason": reason.strip(),
    }  # fmt: skip


def latencies(shapes=SHAPES, rows=ROWS, times=TIMES):
    return Latencies(
        rows=tuple(
            row(shape, m, candidate, values[position])
            for shape in shapes
            for position, m in enumerate(rows)
            for candidate, values in times.items()
        ),
        names=shapes,
        source="tiny",
        device=DEVICE,
        roofline=ROOFLINE,
        from_store=8,
        elapsed_s=75.0,
    )
