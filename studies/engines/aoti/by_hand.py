"""Export a plan whose layers are chosen by hand, and save the same plan for `autoquant generate`.

    python studies/engines/aoti/by_hand.py MODEL OUT aoti|pt2

MODEL is a language model's folder. MLPs and the head are int8 rows, attention is int4 in groups of
32. Up to 16 rows are computed by the project's own kernels, more rows by unpacking the weight. OUT
gets the folders `checkpoint` and `aoti` or `pt2`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from autoquant.candidates import get_format
from autoquant.cli.export import _print_programs
from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.on_disk import apply_to_disk
from autoquant.models import LoadedModel, load_model
from autoquant.profiler.record import record_model
from autoquant.records import LayerChoice, Plan, Prediction, RouteStep, Site, Workload

WORKLOAD = Workload.parse("prefill=256,decode=64")


def main() -> None:
    model, out, to = sys.argv[1:]
    loaded = load_model(model, device="cpu")
    plan, facts = by_hand(loaded), facts_of(loaded)
    del loaded
    folder = Path(out)
    folder.mkdir(exist_ok=True)
    if not (folder / "checkpoint").exists():
        apply_to_disk(plan, model, folder / "checkpoint", facts=facts)
    _print_programs(plan, cast(Any, export_to_disk(plan, model, folder / to, to=to, facts=facts)))


def facts_of(loaded: LoadedModel) -> Any:
    """Return what a study of the model would say, as far as an export asks."""
    device = SimpleNamespace(type="cpu")
    source = asdict(loaded.source)
    return SimpleNamespace(source=source, device=device, calibration=None, workload=WORKLOAD)


def by_hand(loaded: LoadedModel) -> Plan:
    """Return the plan of a model."""
    sites = record_model(loaded, WORKLOAD, lambda _: None).sites
    prediction = Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=0)
    return Plan(
        plan_id="byhand",
        study_id="byhand",
        label="by hand",
        kind="front",
        model_hash=loaded.content_hash,
        dtype=loaded.dtype,
        layers=tuple(map(chosen, sites)),
        prediction=prediction,
    )


def chosen(site: Site) -> LayerChoice:
    """Return a layer's format and route."""
    fmt, many = ("int8-row/plain", "dequantize-matmul")
    if ".self_attn." in site.name:
        fmt, many = ("int4-g32/lanes", "unpack-matmul")
    route = (RouteStep(upper_m=16, kernel="cpu-rows"), RouteStep(upper_m=None, kernel=many))
    return LayerChoice(
        name=site.name,
        parameters=site.parameters,
        shape=site.shape,
        format=fmt,
        route=route,
        numerics=f"{get_format(fmt).values}+a16",
        latency_us={},
        memory_bytes=0,
        loss=0.0,
    )


if __name__ == "__main__":
    main()
