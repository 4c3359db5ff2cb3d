"""A Llama-3-8B with random weights on one GPU: plans and torchao's uniform settings in the whole
model, in turn with bf16.

    python whole_model.py --timings timings.db --out OUT [--fuse] [--batch 1] [--layers 32]
        [--seconds 500]
    python whole_model.py --timings timings.db --out OUT --plans 12 --layers 8

`timings.db` holds what `autoquant profile` measured of the model's shapes; where something is
missing, this says how to make it. `--fuse` adds plans whose q, k and v, and gate and up, are
computed as one (6144x4096 and 28672x4096). `--plans` measures plans of different make instead,
torchao's settings left out. Every model is compiled and captured the same way; latencies are of
CUDA graphs, memory is that of the weights as stored. Each row says what was predicted from the
timings: the unquantized model's time in the same rounds, with its linears' times exchanged for the
plan's. Rows are printed, and written to OUT, as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from plans import (
    DIFFERENT,
    FASTEST,
    FASTEST_FUSED,
    Planner,
    TimingsMissing,
    as_loaded,
    make_planner,
)
from torch import nn

from autoquant.candidates.kernels.caches import kernels_kept
from autoquant.delivery.applier import apply, module_bytes
from autoquant.devices.memory import release_memory
from autoquant.errors import first_line
from autoquant.records import Plan, Workload, request_time
from autoquant.runtime.compiled import shallow_copy
from autoquant.runtime.phases import make_phases
from autoquant.runtime.request import WrongResultError, time_requests, warm_up

PROMPT, STEPS = 2048, 256
SMALL_PROMPT, SMALL_STEPS = 64, 8


def build(layers: int, small: bool) -> nn.Module:
    """The model, random weights, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    full = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
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
        "torchao float8 dynamic rows": setting(
            Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        ),
        "torchao int8 dynamic": setting(Int8DynamicActivationInt8WeightConfig()),
    }


def measure(  # noqa: ANN201
    label: str,
    module: nn.Module,
    original,  # noqa: ANN001
    workload: Workload,
    device: str,
    make,  # noqa: ANN001
):
    """One model, made from a copy of the original.

    Its row, and its phases (None where it does not run).
    """
    row = {"label": label, "batch": workload.batch, "layers": module.config.num_hidden_layers}
    copy = shallow_copy(module)
    began = time.monotonic()
    note = ""
    try:
        make(copy)
        try:
            with kernels_kept(device):
                phases = make_phases(as_loaded(copy), workload, compiled=True)
                warm_up(phases)
        except (
            WrongResultError
        ) as error:  # random weights magnify rounding; said, and timed all the same
            note = str(error)
            for phase in workload.phases:
                phases.reset(phase.name)
                phases.run(phase.name)
        compile_s = time.monotonic() - began
        times = time_requests(phases, original, device)
    except Exception as error:  # noqa: BLE001 - a configuration that does not run is a result
        return row | {"failed": first_line(error, with_type=True)}, None
    request, before = times.request_ms(workload.calls())
    return row | {
        "compile_s": round(compile_s, 1),
        **{f"{phase}_ms": round(ms, 3) for phase, ms in times.plan_ms.items()},
        **{f"bf16_{phase}_ms": round(ms, 3) for phase, ms in times.original_ms.items()},
        "request_ms": round(request, 1), "bf16_request_ms": round(before, 1),
        "speedup": round(before / request, 3),
        "memory_gib": round(module_bytes(copy) / 2**30, 3), "note": note or times.note,
    }, phases  # fmt: skip


def predict(row: dict[str, object], planner: Planner, plan: Plan) -> dict[str, object]:
    """What the timings say of the row's plan: bf16's time less bf16's linears plus the plan's."""
    before, after = planner.linear_ms(None), planner.linear_ms(plan)
    phase_ms = {phase: row[f"bf16_{phase}_ms"] - before[phase] + after[phase] for phase in after}
    request_ms = request_time(phase_ms, planner.workload.calls())
    return {
        **{f"linear_{phase}_ms": round(ms, 3) for phase, ms in after.items()},
        **{f"predicted_{phase}_ms": round(ms, 3) for phase, ms in phase_ms.items()},
        "predicted_request_ms": round(request_ms, 1),
        "prediction_error": round(request_ms / row["request_ms"] - 1, 4),
    }  # fmt: skip


def make_plans(planner: Planner, arguments: argparse.Namespace) -> dict[str, Plan]:
    """The plans that were asked for, by label.

    Those that are another one's again are left out, and said.
    """
    makes = dict(list(DIFFERENT.items())[: arguments.plans]) if arguments.plans else FASTEST
    makes = makes | (FASTEST_FUSED if arguments.fuse and not arguments.plans else {})
    makes = {
        label: make
        for label, make in makes.items()
        if not arguments.only or label in arguments.only
    }
    planner.check(list(makes.values()), arguments.timings, arguments.out / "shapes.txt")
    plans: dict[str, Plan] = {}
    for label, make in makes.items():
        plan = planner.plan(label, make)
        again = next(
            (known for known, other in plans.items() if other.plan_id == plan.plan_id), None
        )
        joined = sum(bool(layer.joined) for layer in plan.layers)
        linear_ms = request_time(planner.linear_ms(plan), planner.workload.calls())
        print(
            f"{label}: {plan.formats()}, {joined} computed with others, linears {linear_ms:.1f} "
            "ms a request",
            end="",
        )
        print(f"; the same plan as {again}, not measured again" if again else "", flush=True)
        if not again:
            plans[label] = plan
    return plans


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timings", help="without it only torchao's settings are measured")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--seconds", type=float, default=500, help="no further model is begun after these"
    )
    parser.add_argument(
        "--small", action="store_true", help="a small model on the CPU, to try this script"
    )
    parser.add_argument("--fuse", action="store_true", help="also plans that compute layers as one")
    parser.add_argument(
        "--plans",
        type=int,
        default=0,
        metavar="N",
        help=f"N of {len(DIFFERENT)} plans of different make",
    )
    parser.add_argument("--only", nargs="*", help="names of the models to measure")
    return parser.parse_args()


def summarise(rows: list[dict[str, object]]) -> None:
    """How far predictions were off."""
    errors = [abs(row["prediction_error"]) for row in rows if "prediction_error" in row]
    if errors:
        print(
            f"predicted request time: median error {statistics.median(errors):.1%}, worst "
            f"{max(errors):.1%}, ",
            end="",
        )
        print(f"{len(errors)} plans", flush=True)


def main() -> None:
    """Measure until the time is up."""
    arguments = parse()
    started = time.monotonic()
    device = "cpu" if arguments.small else "cuda"
    prompt, steps = (SMALL_PROMPT, SMALL_STEPS) if arguments.small else (PROMPT, STEPS)
    workload = Workload.parse(
        f"prefill={prompt // arguments.batch},decode={steps}", arguments.batch
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    module = build(arguments.layers, arguments.small)
    print(f"built {time.monotonic() - started:.0f} s", flush=True)
    plans: dict[str, Plan] = {}
    if arguments.timings:
        planner = make_planner(module, workload, device, arguments.timings)
        plans = make_plans(planner, arguments)
    makers: dict[str, Callable[[nn.Module], object]] = {
        label: lambda copy, plan=plan: apply(plan, copy) for label, plan in plans.items()
    }
    if not arguments.plans:
        makers |= {
            label: make
            for label, make in torchao_settings().items()
            if not arguments.only or label in arguments.only
        }
    with kernels_kept(device):
        original = make_phases(as_loaded(module), workload, compiled=True)
        warm_up(original)
    print(f"bf16 ready {time.monotonic() - started:.0f} s", flush=True)
    rows: list[dict[str, object]] = []
    for label, make in makers.items():
        if time.monotonic() - started > arguments.seconds:
            print(f"{label}: not measured, {arguments.seconds:.0f} s are over", flush=True)
            continue
        row, phases = measure(label, module, original, workload, device, make)
        if phases is not None and label in plans:
            row |= predict(row, planner, plans[label])
        rows.append(row)
        print(json.dumps(row), flush=True)
        name = "plans" if arguments.plans else "rows"
        with (arguments.out / f"{name}-{arguments.batch}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        del phases
        release_memory()
    summarise(rows)
    print(f"done {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        with torch.no_grad():
            main()
    except TimingsMissing as error:
        sys.exit(str(error))
