"""How long it takes to solve 300 layers of 40 choices exactly, with one limit and with two, and
`autoquant solve` as a whole.

    python studies/solver/bench.py OUT [--instances 20] [--layers 300] [--choices 40]

Three kinds of instances. `shapes`: as a search has them; layers of 7 shapes share times and bytes,
choices lie on a curve of time and bytes against loss, with scatter. `curve`: the same, but no two
layers have anything in common. `random`: times, losses and bytes are independent of one another.
Each is solved for loss limits that a third and two thirds of the layers' log-loss range allow; with
two limits, memory may take the mean of what the fastest and the smallest solution within the loss
limit take, so that both bind. Then `autoquant solve` is run on a database of one such study for
each kind, and its process timed. OUT gets `solver.json` and `solver.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoquant.records import Device, LayerChoice, LinearShape, RouteStep, Workload
from autoquant.solver.additivity import ADDITION
from autoquant.solver.planning import PlanContext
from autoquant.solver.solve import AdditiveProblem, fastest, smallest
from autoquant.solver.space import SearchSpace
from autoquant.store import open_store

SHAPES = (
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (6144, 4096),
    (2048, 2048),
    (8192, 2048),
)
BITS = (8.0, 8.5, 6.5, 4.5, 4.25, 4.0, 3.5, 2.5)
SHARES = (1 / 3, 2 / 3)
PROCESS_RUNS = 5
Table = np.ndarray
"""`[layers, choices, 3]`: milliseconds, loss, bytes.

The first choice of a layer is the unquantized one.
"""


def shapes(layers: int, choices: int, seed: int) -> Table:
    draw = np.random.default_rng(seed)
    kinds = [_curve(choices, size, draw) for size in SHAPES]
    table = np.stack([kinds[layer % len(kinds)] for layer in range(layers)])
    table[:, :, 1] *= _sensitivity(layers, draw) * np.exp(draw.normal(0, 0.2, (layers, choices)))
    return table


def curve(layers: int, choices: int, seed: int) -> Table:
    draw = np.random.default_rng(seed)
    sizes = np.exp(draw.uniform(np.log(512), np.log(16384), (layers, 2)))
    table = np.stack([_curve(choices, size, draw) for size in sizes])
    table[:, :, 1] *= _sensitivity(layers, draw)
    return table


def independent(layers: int, choices: int, seed: int) -> Table:
    draw = np.random.default_rng(seed)
    size = (layers, choices)
    table = np.stack(
        (
            draw.uniform(0.1, 5, size),
            draw.exponential(0.01, size),
            draw.integers(1000, 10**6, size),
        ),
        -1,
    )
    table[:, 0] = (5.0, 0.0, 10**6)
    return table


def _curve(choices: int, size: Sequence[float], draw: np.random.Generator) -> Table:
    """One layer: few storages, several ways to compute with each."""
    numbers = float(size[0]) * float(size[1])
    bits = np.concatenate(([16.0], np.resize(BITS, choices - 1)))
    speed = np.concatenate(([1.0], draw.lognormal(0.0, 0.35, choices - 1)))
    milliseconds = numbers * (bits / 8 / 3e9 + 2e-9 * draw.uniform(0.2, 1.0, choices)) / speed
    losses = np.where(bits < 16, 4.0**-bits * np.exp(draw.normal(0, 0.3, choices)), 0.0)
    return np.stack((milliseconds, losses, np.round(numbers * bits / 8)), -1)


def _sensitivity(layers: int, draw: np.random.Generator) -> Table:
    return draw.lognormal(0.0, 1.0, (layers, 1))


KINDS: dict[str, Callable[[int, int, int], Table]] = {
    "shapes": shapes,
    "curve": curve,
    "random": independent,
}


@dataclass(frozen=True)
class Case:
    """A problem with its limits; `max_memory` None where there is one limit."""

    kind: str
    problem: AdditiveProblem
    max_loss: float
    max_memory: float | None


def cases(kind: str, table: Table) -> Iterator[Case]:
    problem = AdditiveProblem.build(table.tolist())
    quick = fastest(problem)
    assert quick is not None
    most = problem.totals(quick)[1]
    for share in SHARES:
        max_loss = most * 10 ** (-3 * (1 - share))
        yield Case(kind, problem, max_loss, None)
        ends = fastest(problem, max_loss), smallest(problem, max_loss)
        yield Case(
            kind, problem, max_loss, statistics.fmean(problem.totals(end)[2] for end in ends if end)
        )


def seconds_of(solve: Callable[[], object]) -> float:
    started = time.perf_counter()
    solve()
    return time.perf_counter() - started


def store_study(path: str, table: Table, workload: Workload) -> None:
    """A database with one study that has come as far as to solve."""
    shape = LinearShape(n=64, k=64, bias=False, dtype="bfloat16")
    route = (RouteStep(upper_m=None, kernel="matmul"),)
    options = [
        [
            LayerChoice(
                name=f"model.layers.{number}",
                shape=shape,
                format=f"f{index}/plain" if index else "bfloat16/plain",
                route=route,
                numerics=f"f{index}+a16",
                latency_us={
                    phase.name: 1e3 * ms / phase.calls / len(workload.phases)
                    for phase in workload.phases
                },
                memory_bytes=int(size),
                loss=loss,
                parameters=(f"model.layers.{number}.weight",),
            )
            for index, (ms, loss, size) in enumerate(layer)
        ]
        for number, layer in enumerate(table.tolist())
    ]
    device = Device(type="cpu", name="none", capability="", threads=1, cache_bytes=1, versions={})
    context = PlanContext(
        study_id="study",
        model_hash="model",
        dtype="bfloat16",
        workload=workload,
        other_bytes=0,
        loss_map=ADDITION,
    )
    store = open_store(path)
    store.put_device(device)
    store.put_model("model", {"kind": "live", "path": ""})
    store.put_study(
        "study", model_hash="model", device=device, identity={}, workload=workload, limits={}
    )
    space = SearchSpace(options, context, logarithmic=True)
    store.put_options("study", space.options, space.about())
    store.close()


def process_seconds(table: Table, case: Case) -> list[float]:
    """Seconds of the clock that `autoquant solve` takes, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/plan.db"
        store_study(path, table, Workload.parse("prefill=512,decode=128"))
        command = [
            sys.executable,
            "-m",
            "autoquant",
            "solve",
            path,
            "--max-kl",
            repr(case.max_loss),
        ]
        if case.max_memory is not None:
            command += ["--max-memory", str(int(case.max_memory))]
        return [
            seconds_of(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
            for _ in range(PROCESS_RUNS)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--choices", type=int, default=40)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[float]] = {}
    for kind, make in KINDS.items():
        for seed in range(arguments.instances):
            table = make(arguments.layers, arguments.choices, seed)
            for number, case in enumerate(cases(kind, table)):
                row = f"{kind}, {'one limit' if case.max_memory is None else 'two limits'}"
                seconds = seconds_of(
                    lambda case=case: fastest(case.problem, case.max_loss, case.max_memory)
                )
                found.setdefault(row, []).append(seconds)
                if seed == 0 and number < 2:
                    found[f"`autoquant solve`, {row}"] = process_seconds(table, case)
        print(
            *(f"{row}: {statistics.median(of):.2f} s" for row, of in found.items()),
            sep="\n",
            flush=True,
        )
    lines = ["| instances | median s | worst s | runs |", "| --- | --- | --- | --- |"]
    for row, of in sorted(found.items(), key=lambda item: item[0].startswith("`")):
        lines.append(f"| {row} | {statistics.median(of):.2f} | {max(of):.2f} | {len(of)} |")
    (arguments.out / "solver.json").write_text(json.dumps(found))
    (arguments.out / "solver.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
