"""A Llama-3-8B with random weights on one GPU: plans and torchao's uniform settings in the whole model, in turn with bf16.

    python whole_model.py --timings timings.db --out OUT [--batch 1] [--layers 32] [--seconds 500]

`timings.db` holds what `autoquant profile` measured of the model's shapes (studies/gpu_linears), and of 6144x4096 and 28672x4096:
q, k and v as one, gate and up as one. Every model is compiled and
captured the same way; latencies are of CUDA graphs. Results are printed and written as they come.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from autoquant.applier import apply, module_bytes
from autoquant.candidates import select
from autoquant.evaluators.request import WrongResultError, time_requests, warm_up
from autoquant.profiler.compiled import share
from autoquant.profiler.device import fingerprint
from autoquant.profiler.phases import make_phases
from autoquant.profiler.profile import with_original
from autoquant.profiler.record import record
from autoquant.profiler.timing import PROTOCOL, first_line
from autoquant.records import Measurement, Plan, Workload
from autoquant.store import open_store
from autoquant.tuner.choices import format_facts, site_choices
from autoquant.tuner.fusion import make_fusion
from autoquant.tuner.planning import PlanContext, make_plan, request_ms

PROMPT, STEPS = 2048, 256
ATTRIBUTED = ("8 bits, fused", "torchao float8 weight-only")
PLANS = {
    "8 bits": ("float8*", "int8*"),
    "any bits": ("float8*", "int8*", "int4-g128*"),
    "4 bits": ("int4-g128*",),
    "float8 rows": ("float8-row*",),
}
FUSED = ", fused"


def build(layers: int, small: bool) -> nn.Module:
    """The model, random weights, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    full = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(
        **(size if small else full),
        num_hidden_layers=layers,
        vocab_size=512 if small else 128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cpu" if small else "cuda"):
        module = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return module


def make_plans(module: nn.Module, workload: Workload, device: str, timings_db: str) -> dict[str, Plan]:
    """For each set of formats, the fastest choice of every layer by its own timings, with and without siblings as one."""
    hardware = fingerprint(device)
    store = open_store(timings_db, create=False)
    timings = store.timings(hardware, PROTOCOL)
    print(f"{len(timings)} timings of {hardware.name}", flush=True)
    recording = record(module, make_phases(module, "causal_lm", workload, device=device))
    shapes = list(dict.fromkeys(site.shape for site in recording.sites))
    working_set = max(subject.working_set_bytes for subject in timings)
    context = PlanContext(
        study_id="whole-model", model_hash="random", dtype="bfloat16", workload=workload, other_bytes=0
    )
    plans = {}
    for label, globs in PLANS.items():
        pairs = with_original(select(globs, torch.device(device).type), "bfloat16")
        facts = format_facts(list({fmt.id: fmt for fmt, _ in pairs}.values()), shapes, device)
        chosen = []
        for site in recording.sites:
            choices = site_choices(site, pairs, _Complete(timings), facts, workload, working_set).choices
            chosen.append(min(choices, key=lambda choice: request_ms(choice, workload)))
        plans[label] = make_plan(chosen, label, "front", context)
        fusion = make_fusion(recording.sites, pairs, _Complete(timings), workload, working_set)
        fused = make_plan(chosen, label + FUSED, "front", replace(context, fusion=fusion))
        if any(layer.joined for layer in fused.layers):
            plans[fused.label] = fused
    for label, plan in plans.items():
        joined = sum(bool(layer.joined) for layer in plan.layers)
        print(
            f"{label}: {plan.formats()}, {joined} computed with others,",
            f"linears {plan.prediction.linear_ms:.1f} ms a request",
            flush=True,
        )
    return plans


class _Complete(dict):  # type: ignore[type-arg]
    """Timings; what was not measured says so."""

    def __missing__(self, subject):  # noqa: ANN001, ANN204
        return Measurement(subject=subject, outcome="unsupported", reason="not timed")


def torchao_settings() -> dict[str, Callable[[nn.Module], None]]:
    """torchao's own configurations, for every linear."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    def setting(config: object) -> Callable[[nn.Module], None]:
        return lambda module: quantize_(module, config)

    return {
        "torchao float8 weight-only": setting(Float8WeightOnlyConfig()),
        "torchao float8 dynamic rows": setting(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())),
        "torchao int8 dynamic": setting(Int8DynamicActivationInt8WeightConfig()),
    }


def attribution(phases, phase: str, out: Path) -> list[tuple[str, float]]:  # noqa: ANN001
    """Microseconds a step by kernel, most first, from the profiler; with the gaps between kernels."""
    phases.reset(phase)
    phases.run(phase)
    torch.cuda.synchronize()
    steps = 3 if phase == "decode" else 1
    if phase == "prefill":
        phases.reset(phase)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            phases.run(phase)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(out))
    events = [
        event
        for event in json.loads(out.read_text())["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    sums: dict[str, float] = {}
    for event in events:
        sums[event["name"][:90]] = sums.get(event["name"][:90], 0.0) + event["dur"] / steps
    span = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    sums["(gaps)"] = span / steps - sum(sums.values())
    out.unlink()
    return sorted(sums.items(), key=lambda item: -item[1])


def measure(label: str, module: nn.Module, original, workload: Workload, device: str, make):  # noqa: ANN001, ANN201
    """One model, made from a copy of the original: its row and its phases; None where it does not run."""
    copy = share(module)
    make(copy)
    began = time.monotonic()
    note = ""
    try:
        phases = make_phases(copy, "causal_lm", workload, device=device, compiled=True)
        try:
            warm_up(phases)
        except WrongResultError as error:  # random weights magnify rounding; said, and timed all the same
            note = str(error)
            for phase in workload.phases:
                phases.reset(phase.name)
                phases.run(phase.name)
        compile_s = time.monotonic() - began
        times = time_requests(phases, original, device)
    except Exception as error:  # noqa: BLE001 - a configuration that does not run is a result
        print(f"{label}: {first_line(error)}", flush=True)
        return None
    request, before = times.request_ms(workload.calls())
    row = {
        "label": label, "batch": workload.batch, "compile_s": round(compile_s, 1),
        **{f"{phase}_ms": round(ms, 3) for phase, ms in times.plan_ms.items()},
        **{f"bf16_{phase}_ms": round(ms, 3) for phase, ms in times.original_ms.items()},
        "request_ms": round(request, 1), "bf16_request_ms": round(before, 1), "speedup": round(before / request, 3),
        "memory_gib": round(module_bytes(copy) / 2**30, 2), "note": note or times.note,
    }  # fmt: skip
    return row, phases


def write_attribution(out: Path, batch: int, models: dict[str, object]) -> None:
    """Where the microseconds of a decode step go, for each model."""
    with (out / f"attribution-{batch}.txt").open("a") as file:
        for name, phases in models.items():
            table = attribution(phases, "decode", out / "trace.json")
            lines = "".join(f"{us:9.1f} us {kernel}\n" for kernel, us in table[:25])
            file.write(f"== decode step of {name}\n{lines}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timings", help="without it only torchao's settings are measured")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=500, help="no further model is begun after these")
    parser.add_argument("--small", action="store_true", help="a small model on the CPU, to try this script")
    parser.add_argument("--only", nargs="*", help="names of the models to measure")
    return parser.parse_args()


def main() -> None:
    """Measure until the time is up."""
    arguments = parse()
    started = time.monotonic()
    device = "cpu" if arguments.small else "cuda"
    workload = Workload.parse(f"prefill={PROMPT // arguments.batch},decode={STEPS}", arguments.batch)
    module = build(arguments.layers, arguments.small)
    print(f"built {time.monotonic() - started:.0f} s", flush=True)
    makers: dict[str, Callable[[nn.Module], object]] = {}
    if arguments.timings:
        plans = make_plans(module, workload, device, arguments.timings)
        makers |= {label: lambda copy, plan=plan: apply(plan, copy) for label, plan in plans.items()}
    makers |= torchao_settings()
    original = make_phases(module, "causal_lm", workload, device=device, compiled=True)
    warm_up(original)
    print(f"bf16 ready {time.monotonic() - started:.0f} s", flush=True)
    attributed: dict[str, object] = {}
    for label, make in makers.items():
        if time.monotonic() - started > arguments.seconds or (arguments.only and label not in arguments.only):
            continue
        measured = measure(label, module, original, workload, device, make)
        if measured is None:
            continue
        row, phases = measured
        print(json.dumps(row), flush=True)
        with (arguments.out / f"rows-{arguments.batch}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if label in ATTRIBUTED and device == "cuda":
            attributed[label] = phases
        del phases, measured
    if attributed:  # last: what is timed after a profiler was at work is slower
        write_attribution(arguments.out, arguments.batch, {"bf16": original, **attributed})
    print(f"done {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
