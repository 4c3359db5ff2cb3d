"""Records as JSON, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from autoquant.records import (
    Delivery,
    Interval,
    LayerChoice,
    LinearShape,
    Phase,
    Proof,
    Recording,
    RouteStep,
    RunTimes,
    Site,
    SiteUse,
    Skipped,
    Workload,
)


def plain(record: Any) -> dict[str, Any]:
    """A record as JSON-ready dicts and lists."""
    return cast(dict[str, Any], json.loads(to_json(record)))


def to_json(record: Any) -> str:
    """Serialize a record."""
    return json.dumps(asdict(record), separators=(",", ":"))


def _shape(data: Mapping[str, Any]) -> LinearShape:
    return LinearShape(**data)


def site_from(data: Mapping[str, Any]) -> Site:
    return Site(
        name=data["name"],
        parameters=tuple(data["parameters"]),
        shape=_shape(data["shape"]),
        uses=tuple(SiteUse(**use) for use in data["uses"]),
        kept=tuple(data["kept"]),
        siblings=tuple(data["siblings"]),
    )


def recording_from(data: Mapping[str, Any]) -> Recording:
    """Rebuild a `Recording` from its JSON object."""
    return Recording(
        sites=tuple(site_from(site) for site in data["sites"]),
        skipped=tuple(Skipped(**skipped) for skipped in data["skipped"]),
        weights_share=data["weights_share"],
        flops_share=data["flops_share"],
        parameter_bytes=data["parameter_bytes"],
    )


def workload_from(data: Mapping[str, Any]) -> Workload:
    """Rebuild a `Workload` from its JSON object."""
    return Workload(phases=tuple(Phase(**phase) for phase in data["phases"]), batch=data["batch"])


def layer_from(data: Mapping[str, Any]) -> LayerChoice:
    """Rebuild a `LayerChoice` from its JSON object."""
    rest = {key: value for key, value in data.items() if key not in ("shape", "route", "parameters", "joined")}
    return LayerChoice(
        shape=_shape(data["shape"]),
        route=tuple(RouteStep(**step) for step in data["route"]),
        parameters=tuple(data["parameters"]),
        joined=tuple(data.get("joined", ())),
        **rest,
    )


def proof_from(data: Mapping[str, Any]) -> Proof:
    """Rebuild a `Proof` from its JSON object."""
    rest = dict(data)
    for name in ("increase", "selection_increase", "selection_kl", "time_ratio"):
        rest[name] = Interval(**rest[name]) if rest.get(name) else None
    for name in ("notes", "selection_losses"):
        rest[name] = tuple(rest.get(name, ()))
    return Proof(**rest)


def delivery_from(data: Mapping[str, Any]) -> Delivery:
    """Rebuild a `Delivery` from its JSON object."""
    rest = dict(data) | {"notes": tuple(data["notes"])}
    for name in ("times", "original_times"):
        rest[name] = RunTimes(**rest[name]) if rest[name] else None
    rest["ratio"] = Interval(**rest["ratio"]) if rest["ratio"] else None
    return Delivery(**rest)
