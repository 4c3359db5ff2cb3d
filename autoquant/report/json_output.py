"""Records and rows as JSON. Numbers that are not finite become null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from autoquant.records import LayerChoice, Plan, Proof, Recording
from autoquant.solver.alternatives import Alternative, Alternatives


def dumps(value: Any) -> str:
    """Return `value` as indented JSON, without NaN and Infinity, which JSON lacks."""
    return json.dumps(finite(value), indent=2, allow_nan=False, default=str)


def plan_object(
    plan: Plan,
    row: Mapping[str, Any] | None,
    proof: Proof | None,
    recording: Recording | None,
    alternatives: Alternatives | None,
) -> dict[str, Any]:
    """Return a plan with its layers, measurements and coverage.

    Args:
        row: The row of `Study.rows`, or None for an unproven plan.
        proof: The proof, or None for an unproven plan.
        alternatives: Other choices of the layers, or None if unknown.
    """
    head = {
        "plan_id": plan.plan_id,
        "label": plan.label,
        "kind": plan.kind,
        "proven": row is not None,
        "predicted_request_ms": plan.prediction.request_ms,
        "predicted_loss": plan.prediction.loss,
        "predicted_memory_bytes": plan.prediction.memory_bytes,
    }
    return {
        **head,
        **(row or {}),
        "measured_phase_ms": dict(proof.phase_ms) if proof else None,
        "original_phase_ms": dict(proof.original_phase_ms) if proof else None,
        "execution": proof.execution if proof else None,
        "notes": list(proof.notes) if proof else [],
        "study_id": plan.study_id,
        "model_hash": plan.model_hash,
        "dtype": plan.dtype,
        "formats": plan.formats(),
        "layers": [
            layer_object(layer, (alternatives or {}).get(layer.name)) for layer in plan.layers
        ],
        "coverage": coverage_object(recording) if recording else None,
    }


def layer_object(layer: LayerChoice, alternatives: Sequence[Alternative] | None) -> dict[str, Any]:
    """Return the choice of one layer. Differences of alternatives are for one request."""
    return {
        "name": layer.name,
        "shape": asdict(layer.shape),
        "experts": layer.experts,
        "format": layer.format,
        "route": _route(layer),
        "numerics": layer.numerics,
        "latency_us": dict(layer.latency_us),
        "loss": layer.loss,
        "memory_bytes": layer.memory_bytes,
        "joined": list(layer.joined),
        "tied": layer.tied,
        "reason": layer.reason,
        "alternatives": alternative_objects(alternatives),
    }


def alternative_objects(found: Sequence[Alternative] | None) -> list[dict[str, Any]] | None:
    """Return a layer's alternatives, or None if they are unknown."""
    if found is None:
        return None
    return [
        {
            "gains": list(each.gains),
            "format": each.choice.format,
            "route": _route(each.choice),
            "numerics": each.choice.numerics,
            "joined": list(each.choice.joined),
            "request_us": each.request_us,
            "loss": each.loss,
            "memory_bytes": each.memory_bytes,
        }
        for each in found
    ]


def coverage_object(recording: Recording) -> dict[str, Any]:
    """Return the share of the model that is searched, and what is not."""
    return {
        "layers": len(recording.sites),
        "tables": [table.name for table in recording.tables],
        "weights_share": recording.weights_share,
        "flops_share": dict(recording.flops_share),
        "skipped": [asdict(skipped) for skipped in recording.skipped],
    }


def _route(layer: LayerChoice) -> list[dict[str, Any]]:
    return [asdict(step) for step in layer.route]


def finite(value: Any) -> Any:
    """Return `value` with None for numbers that are not finite, and with texts as keys."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
