"""Export a plan that is written down by hand, with the calibration of a search, as a GGUF.

    python studies/engines/gguf/by_hand.py plan.db MODEL OUT END=FORMAT/KERNEL ...

END is the end of a layer's name, and empty for all; the last that fits counts. The tied head is
written for the embedding, too. It shows what types are worth, without waiting for a solver.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from autoquant.candidates import get_format
from autoquant.delivery.exporting import export_to_disk
from autoquant.models import load_model
from autoquant.profiler.record import record_model
from autoquant.records import LayerChoice, Plan, Prediction, RouteStep, Site
from autoquant.store import open_store
from autoquant.study.study import Study

NOTHING = Prediction(request_ms=0.0, linear_ms=0.0, loss=0.0, memory_bytes=0)


def main(database: str, model: str, out: str, *rules: str) -> None:
    store = open_store(database)
    facts = Study(store, store.studies()[0]).facts
    loaded = load_model(model, device="cpu")
    sites = record_model(loaded, facts.workload, lambda _event: None).sites
    plan = Plan(
        plan_id="by-hand",
        study_id=facts.study_id,
        label="by hand",
        kind="solved",
        model_hash=loaded.content_hash,
        dtype=loaded.dtype,
        layers=tuple(choice(site, [rule.split("=") for rule in rules]) for site in sites),
        prediction=NOTHING,
    )
    report = export_to_disk(plan, model, out, to="gguf", facts=facts, embedding="head")
    print(f"{report.file_bytes:,} bytes", dict(report.schemes), report.likeness)


def choice(site: Site, rules: list[list[str]]) -> LayerChoice:
    """Return what the last rule that fits makes of a layer."""
    candidate = [candidate for end, candidate in rules if site.name.endswith(end)][-1]
    format_id, _, kernel = candidate.rpartition("/")
    empty = LayerChoice(
        name=site.name,
        parameters=site.parameters,
        shape=site.shape,
        format=format_id,
        route=(RouteStep(upper_m=None, kernel=kernel),),
        numerics="",
        latency_us={},
        memory_bytes=0,
        loss=0.0,
    )
    return replace(empty, numerics=f"{get_format(format_id).values}+a16")


if __name__ == "__main__":
    main(*sys.argv[1:])
