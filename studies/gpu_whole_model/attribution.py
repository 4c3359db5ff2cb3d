"""Where a step of a Llama-3-8B goes on one GPU, microsecond by microsecond: layers, glue and gaps.

    python attribution.py --timings timings.db --out OUT [--batch 1] [--layers 32]
        [--only "8 bits" ...]

The models are those of whole_model.py. They are timed in turn, and after that one step of each
phase is profiled. Writes attribution-BATCH.txt, and trace-BATCH.json for chrome://tracing or
Perfetto.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from plans import FASTEST, FASTEST_FUSED, TimingsMissing, as_loaded, make_planner
from rich.console import Console
from torch import nn
from whole_model import PROMPT, STEPS, build, torchao_settings

from autoquant.candidates.kernels.caches import kernels_kept
from autoquant.delivery.applier import apply, module_bytes
from autoquant.records import Plan, Workload, request_time
from autoquant.report.attribution import attribution_report, trace_object
from autoquant.runtime.attribution import attribute
from autoquant.runtime.compiled import shallow_copy
from autoquant.runtime.phases import Phases, make_phases
from autoquant.runtime.request import WrongResultError, time_in_turn, warm_up
from autoquant.tuner.bench import BenchRow

MODELS = ("8 bits", "8 bits, fused", "torchao float8 weight-only")


@dataclass
class Model:
    """A model ready to run."""

    label: str
    module: nn.Module
    phases: Phases
    plan: Plan | None = None
    note: str = ""


def make_ready(
    label: str, module: nn.Module, workload: Workload, device: str, plan: Plan | None = None
) -> Model:
    """Compile, capture and run a model.

    Random weights magnify rounding: a wrong result is noted, not refused.
    """
    note = ""
    try:
        with kernels_kept(device):
            phases = make_phases(as_loaded(module), workload, compiled=True)
            warm_up(phases)
    except WrongResultError as error:
        note = str(error)
        for phase in workload.phases:
            phases.reset(phase.name)
            phases.run(phase.name)
    print(f"ready: {label} {note}", flush=True)
    return Model(label, module, phases, plan, note)


def make_models(arguments: argparse.Namespace, workload: Workload, device: str) -> list[Model]:
    """The unquantized model, and those asked for."""
    module = build(arguments.layers, arguments.small)
    models = [make_ready("bf16", module, workload, device)]
    plans: dict[str, Plan] = {}
    if arguments.timings:
        planner = make_planner(module, workload, device, arguments.timings)
        makes = {
            label: make
            for label, make in (FASTEST | FASTEST_FUSED).items()
            if label in arguments.only
        }
        planner.check(list(makes.values()), arguments.timings, arguments.out / "shapes.txt")
        plans = {label: planner.plan(label, make) for label, make in makes.items()}
    makers = {label: partial(apply, plan) for label, plan in plans.items()} | torchao_settings()
    for label in arguments.only:
        if label not in makers:
            print(f"{label}: there is no such model here, only {', '.join(makers)}", flush=True)
            continue
        copy = shallow_copy(module)
        makers[label](copy)
        models.append(make_ready(label, copy, workload, device, plans.get(label)))
    return models


def profiled(model: Model, phase_ms: dict[str, float], workload: Workload, device: str) -> BenchRow:
    """What was timed of a model, with its steps."""
    layers = {layer.name: layer.parameters[0] for layer in model.plan.layers} if model.plan else {}
    row = BenchRow(
        plan_id=model.plan.plan_id if model.plan else None,
        label=model.label,
        phase_ms=phase_ms,
        request_ms=request_time(phase_ms, workload.calls()),
        predicted_request_ms=model.plan.prediction.request_ms if model.plan else None,
        memory_bytes=module_bytes(model.module),
        peak_bytes=None,
        notes=tuple(filter(None, [model.note])),
    )
    return replace(row, steps=attribute(model.phases, model.module, layers, device))


def with_rest(plan: Plan | None, original: BenchRow, workload: Workload) -> Plan | None:
    """The plan, which so far predicts its linears only, with what bf16 takes besides its own."""
    if plan is None:
        return None
    linears = {
        phase: sum(step.layer_us({}).values()) / 1e3 for phase, step in original.steps.items()
    }
    rest_ms = original.request_ms - request_time(linears, workload.calls())
    return replace(
        plan, prediction=replace(plan.prediction, request_ms=plan.prediction.linear_ms + rest_ms)
    )


def main() -> None:
    """Time, then profile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--timings", help="as for whole_model.py; without it torchao's settings only"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--small", action="store_true", help="a small model on the CPU, to try this script"
    )
    parser.add_argument(
        "--only", nargs="*", default=MODELS, help="names of the models to look into"
    )
    arguments = parser.parse_args()
    device = "cpu" if arguments.small else "cuda"
    workload = Workload.parse(
        f"prefill={PROMPT // arguments.batch},decode={STEPS}", arguments.batch
    )
    models = make_models(arguments, workload, device)
    times, note = time_in_turn([model.phases for model in models], device)
    print(note, flush=True)
    original, *rows = [
        profiled(model, phase_ms, workload, device)
        for model, phase_ms in zip(models, times, strict=True)
    ]
    with (arguments.out / f"attribution-{arguments.batch}.txt").open("w") as file:
        console = Console(file=file, width=120)
        for row, model in zip(rows, models[1:], strict=True):
            plan = with_rest(model.plan, original, workload)
            console.print(attribution_report(row, original, plan, workload, console.width))
    trace = trace_object({row.label: row.steps for row in (original, *rows)})
    (arguments.out / f"trace-{arguments.batch}.json").write_text(json.dumps(trace))


if __name__ == "__main__":
    try:
        with torch.no_grad():
            main()
    except TimingsMissing as error:
        sys.exit(str(error))
