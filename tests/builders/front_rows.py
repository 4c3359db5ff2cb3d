"""Rows of a front, made up."""

from __future__ import annotations


def row(label, kind, time, increase, **changes):
    values = {
        "plan_id": label, "label": label, "kind": kind, "predicted_request_ms": time,
        "measured_request_ms": time,
        "speedup": 200 / time, "measure": "perplexity", "perplexity": 20 * (1 + increase),
        "perplexity_increase": increase,
        "perplexity_increase_low": increase - 0.001, "perplexity_increase_high": increase + 0.001,
        "kl": increase / 2,
        "memory_bytes": int(time * 1e5), "on_front": True, "within_limits": True,
        "recommended": False,
    }  # fmt: skip
    return {**values, **changes}


ROWS = [
    row("original", "original", 200.0, 0.0),
    row("uniform int8-row", "uniform", 150.0, 0.004, on_front=False),
    row("front 1", "front", 120.0, 0.003, recommended=True),
    row("front 2", "front", 100.0, 0.03),
]
