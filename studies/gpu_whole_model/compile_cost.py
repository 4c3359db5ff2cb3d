"""Where the seconds go until a model's steps are ready, for models that one process compiles one
after the other.

    python compile_cost.py --out OUT [--models bf16 float8-row "float8-row again"]
        [--layers 32] [--batch 1] [--label cold]

`float8-row again` is the same plan once more, `float8-row in one piece` the model compiled as one
graph with nested regions. Kernels are kept under AUTOQUANT_CACHE: a new folder is a cold start.
Appends a line a model to OUT/compile-cost.jsonl: seconds, and milliseconds of a step. What is
computed is not checked here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._dynamo.utils
from plans import as_loaded
from torch import nn
from whole_model import PROMPT, SMALL_PROMPT, SMALL_STEPS, STEPS, build

from autoquant.candidates import get_format
from autoquant.candidates.kernels.caches import kernels_kept
from autoquant.candidates.routed import RoutedWeight
from autoquant.devices import backend
from autoquant.records import RouteStep, Workload
from autoquant.runtime.compiled import shallow_copy
from autoquant.runtime.phases import Phases, make_phases

ROUTES = {
    "float8-row": (
        "float8-row/plain",
        (RouteStep(upper_m=1, kernel="gemlite"), RouteStep(upper_m=None, kernel="scaled-mm")),
    ),
    "int8-row": (
        "int8-row/plain",
        (
            RouteStep(upper_m=16, kernel="gemlite"),
            RouteStep(upper_m=None, kernel="gemlite-dynamic"),
        ),
    ),
}
AGAIN, IN_ONE_PIECE = " again", " in one piece"
SMALL_ROUTES = {
    "float8-row": ("float8-row/plain", (RouteStep(upper_m=None, kernel="dequantize-matmul"),)),
    "int8-row": (
        "int8-row/plain",
        (RouteStep(upper_m=1, kernel="int8pack-mm"), RouteStep(upper_m=None, kernel="int-mm")),
    ),
}
STAGES = {  # of PyTorch's own record of where compilation spends its time
    "first stage": "bytecode_tracing",
    "guards": "build_guards",
    "second stage": "create_aot_dispatcher_function",
    "inductor: lowering": "GraphLowering.run",
    "inductor: code": "GraphLowering.codegen",
    "inductor: waiting for kernels": "async_compile.wait",
}


@contextmanager
def timed(into: dict[str, float], name: str, device: str) -> Iterator[None]:
    """Add seconds to `into`."""
    backend(device).synchronize()
    began = time.monotonic()
    yield
    backend(device).synchronize()
    into[name] = into.get(name, 0.0) + time.monotonic() - began


def compiler_seconds() -> dict[str, float]:
    """What PyTorch has spent on each stage so far, in this process."""
    return {
        name: sum(seconds) for name, seconds in torch._dynamo.utils.compilation_time_metrics.items()
    }


def watch_tuning(seconds: dict[str, float]) -> Callable[[], None]:
    """Add the seconds that gemlite's kernels spend on tuning to `seconds`.

    Returns what ends that.
    """
    from autoquant.candidates.kernels.gemlite import _tuned_kernels

    kernels = _tuned_kernels()
    originals = [kernel.run for kernel in kernels]

    def watched(kernel, run):  # noqa: ANN001, ANN202
        def timing(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
            known, began = len(kernel.cache), time.monotonic()
            result = run(*args, **kwargs)
            if len(kernel.cache) > known:
                seconds["tuning"] = seconds.get("tuning", 0.0) + time.monotonic() - began
                seconds["tuned"] = seconds.get("tuned", 0) + 1
            return result

        return timing

    for kernel, run in zip(kernels, originals, strict=True):
        kernel.run = watched(kernel, run)

    def end() -> None:
        for kernel, run in zip(kernels, originals, strict=True):
            kernel.run = run

    return end


def quantize(module: nn.Module, model: str, small: bool) -> None:
    """Every linear's weight in the model's format."""
    format_id, route = (SMALL_ROUTES if small else ROUTES)[model]
    for owner in module.modules():
        if isinstance(owner, nn.Linear):
            stored = get_format(format_id).store(owner.weight)
            wrapped = RoutedWeight.wrap(stored, format_id, route, owner.weight.dtype)
            owner.weight = nn.Parameter(wrapped, requires_grad=False)


def make_ready(
    module: nn.Module, label: str, workload: Workload, device: str, small: bool
) -> tuple[dict, Phases]:
    """Apply, compile, capture; the seconds of each part."""
    seconds: dict[str, float] = {}
    model = label.removesuffix(AGAIN).removesuffix(IN_ONE_PIECE)
    before = compiler_seconds()
    copy = shallow_copy(module)
    with timed(seconds, "total", device):
        if model != "bf16":
            with timed(seconds, "apply", device):
                quantize(copy, model, small)
        with timed(seconds, "set up", device):
            division = "regions" if label.endswith(IN_ONE_PIECE) else "parts"
            phases = make_phases(as_loaded(copy), workload, compiled=True, division=division)
        for phase in workload.phases:
            with timed(seconds, f"{phase.name}: eager", device):
                phases.reset(phase.name)
                phases.run_eager(phase.name)
            with timed(seconds, f"{phase.name}: first run", device):
                phases.reset(phase.name)
                phases.run(phase.name)
            with timed(seconds, f"{phase.name}: settle", device):
                for _ in range(2):
                    phases.reset(phase.name)
                    phases.run(phase.name)
    after = compiler_seconds()
    for label, name in STAGES.items():
        seconds[label] = after.get(name, 0.0) - before.get(name, 0.0)
    return seconds, phases


def step_ms(phases: Phases, device: str) -> Mapping[str, float]:
    """Median milliseconds of each phase."""
    found = {}
    for phase in phases.workload.phases:
        samples = []
        for _ in range(7):
            phases.reset(phase.name)
            backend(device).synchronize()
            began = time.perf_counter()
            phases.run(phase.name)
            backend(device).synchronize()
            samples.append((time.perf_counter() - began) * 1e3)
        found[f"{phase.name}_ms"] = sorted(samples)[3]
    return found


def main() -> None:
    """Make models ready in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["bf16", "float8-row", "float8-row again"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--label", default="")
    parser.add_argument(
        "--small", action="store_true", help="a small model on the CPU, to try this script"
    )
    arguments = parser.parse_args()
    device = "cpu" if arguments.small else "cuda"
    prompt, steps = (SMALL_PROMPT, SMALL_STEPS) if arguments.small else (PROMPT, STEPS)
    workload = Workload.parse(
        f"prefill={prompt // arguments.batch},decode={steps}", arguments.batch
    )
    module = build(arguments.layers, arguments.small)
    for label in arguments.models:
        tuning: dict[str, float] = {}
        end = watch_tuning(tuning) if device == "cuda" else lambda: None
        with kernels_kept(device):
            seconds, phases = make_ready(module, label, workload, device, arguments.small)
        end()
        row = {
            "label": arguments.label,
            "model": label,
            "layers": arguments.layers,
            "batch": arguments.batch,
        }
        row |= {name: round(value, 2) for name, value in (seconds | tuning).items()}
        row |= {name: round(value, 3) for name, value in step_ms(phases, device).items()}
        print(json.dumps(row), flush=True)
        with (arguments.out / "compile-cost.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        del phases


if __name__ == "__main__":
    with torch.no_grad():
        main()
