"""Time the steps and the windows of a saved plan on a CPU, by each way of compiling.

    python studies/search_cost/steps.py QUANTIZED_FOLDER [DIVISION ...]

QUANTIZED_FOLDER is what `autoquant apply` wrote. Prints, for each way, the seconds until a prompt of
512 tokens and a step are ready, and the milliseconds of a step (least and median of 60); then those
of a window of 512 tokens, eager and by the compiled prompt (least of 8).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata

import torch

import autoquant
from autoquant.devices import Division
from autoquant.devices.cpu import CpuBackend
from autoquant.evaluators.quality import next_token_logits
from autoquant.models import LoadedModel, from_module
from autoquant.records import Workload
from autoquant.runtime.phases import make_phases

WORKLOAD = Workload.parse("prefill=512,decode=128")


def milliseconds(call: Callable[[], object], count: int) -> list[float]:
    """Return what each of `count` calls takes, after two more."""
    taken = []
    for _ in range(count + 2):
        started = time.perf_counter()
        call()
        taken.append((time.perf_counter() - started) * 1e3)
    return taken[2:]


def time_steps(loaded: LoadedModel, divisions: Sequence[Division]) -> None:
    torch.compile(torch.square)(torch.ones(8))  # the compiler's own preparation
    for division in divisions:
        started = time.perf_counter()
        phases = make_phases(loaded, WORKLOAD, compiled=True, division=division)
        for phase in ("prefill", "decode"):
            phases.reset(phase)
            phases.run(phase)
        ready_s = time.perf_counter() - started
        phases.reset("decode")
        taken = milliseconds(lambda phases=phases: phases.run("decode"), 60)
        print(
            f"{division}: ready after {ready_s:.1f} s, a step takes {min(taken):.2f} ms"
            f" (median {statistics.median(taken):.2f})",
            flush=True,
        )


def time_windows(loaded: LoadedModel) -> None:
    phases = make_phases(loaded, WORKLOAD, compiled=True, division="parts")
    ids = torch.arange(512).unsqueeze(0) % 1000
    for name, module in (("eager", loaded.module), ("compiled", phases.compiled_prompt())):
        taken = milliseconds(lambda module=module: next_token_logits(module, ids), 8)
        print(f"a window, {name}: {min(taken):.0f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("divisions", nargs="*", default=CpuBackend.divisions)
    names = ("torch", "torchao", "transformers")
    print(platform.processor() or platform.machine(), torch.get_num_threads(), "threads")
    print(", ".join(f"{name} {metadata.version(name)}" for name in names), time.strftime("%F"))
    arguments = parser.parse_args()
    loaded = from_module(autoquant.load(arguments.folder, device="cpu"))
    time_steps(loaded, arguments.divisions)
    time_windows(loaded)


if __name__ == "__main__":
    main()
