"""Compare the ways in which `generate` can compile its steps on a CPU.

    python studies/search_cost/divisions.py ready MODEL PLAN [WAY ...]
    python studies/search_cost/divisions.py turns MODEL PLAN [WAY ...]

MODEL is a folder of a causal language model, in bfloat16. PLAN is `int8` (rows, in every linear) or
`mixed`: of the linears in blocks, every one is int8 or int4 by chance, so that nearly every block is
of another make.

A WAY is `parts` or `regions`.

`ready` starts two processes for each way, the first with an empty cache of the compiler, and the
second with what the first left there. Each prints the seconds until the model is loaded and
quantized, and then those of `generate`: of the first token of a prompt of 512, of the first step, of
the first token of a prompt of 200 and, with `--longer`, of a prompt of 760, whose cache is longer,
and a step. Most of it is compiling. CPU time is that of all processes and threads together.

`turns` compiles all ways in one process, and times requests of 512 + 128 tokens in turn: each step,
of which the one is shown that a tenth of the steps is quicker than, and the whole request. On a
machine that others use, `--cpu-time` counts the time of one thread instead.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_STARTED = time.perf_counter()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from autoquant.candidates import get_format  # noqa: E402
from autoquant.candidates.routed import RoutedWeight  # noqa: E402
from autoquant.devices import Division  # noqa: E402
from autoquant.devices.load import OtherLoad  # noqa: E402
from autoquant.intervals import mean_interval  # noqa: E402
from autoquant.records import Interval, RouteStep  # noqa: E402
from autoquant.runtime.generate import decoder  # noqa: E402
from autoquant.runtime.prepare import prepare  # noqa: E402

WAYS: tuple[Division, ...] = ("parts", "regions")
INT8 = ("int8-row/plain", "int8pack-mm")
INT4 = ("int4-g64/cpu-packed", "int4pack-mm")
# As searches on this kind of CPU choose it: for prompts, weights are unpacked.
UPPER_M = 22
PROMPT, NEW_TOKENS = 512, 128


def load_model(path: str, plan: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model.requires_grad_(False)
    chance = random.Random(0)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            in_block = ".layers." in name
            mixes = plan == "mixed" and in_block
            quantize(linear, chance.choice((INT8, INT4)) if mixes else INT8)
    return prepare(model)


def quantize(linear: nn.Linear, candidate: tuple[str, str]) -> None:
    fmt = get_format(candidate[0])
    route = (
        RouteStep(upper_m=UPPER_M, kernel=candidate[1]),
        RouteStep(upper_m=None, kernel="dequantize-matmul"),
    )
    stored = fmt.store(linear.weight)
    weight = RoutedWeight.wrap(stored, fmt.id, route, linear.weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)


def compile_by(way: Division) -> None:
    """Have steps that are made from now on compiled by one way only."""
    decoder.Decoder._divisions = lambda _self: (way,)


def generate_s(
    model: nn.Module, prompt: int, tokens: int, streamer: BaseStreamer | None = None
) -> float:
    ids = torch.arange(prompt).unsqueeze(0) % 1000 + 5
    started = time.perf_counter()
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            streamer=streamer,
        )
    return time.perf_counter() - started


def be_ready(arguments: argparse.Namespace, way: str) -> None:
    """Print as JSON what one process waits for."""
    compile_by(way)
    model = load_model(arguments.model, arguments.plan)
    print(f"loaded {time.perf_counter() - _STARTED:.1f} s", end="")
    requests = {"first token": (PROMPT, 1), "first step": (PROMPT, 2), "prompt of 200": (200, 1)}
    if arguments.longer:
        requests["longer cache"] = (760, 2)
    for name, (prompt, tokens) in requests.items():
        before_s = cpu_s()
        seconds = generate_s(model, prompt, tokens)
        print(f", {name} {seconds:.1f} s (CPU {cpu_s() - before_s:.1f})", end="", flush=True)
    inductor = counters["inductor"]
    caches = (f"{what} {inductor[f'fxgraph_cache_{what}']}" for what in ("hit", "miss", "bypass"))
    print("; graphs on disk:", *caches)


def cpu_s() -> float:
    """Return the CPU time of this process and of all that it started, which others barely change."""
    taken: dict[int, float] = {}
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            number = int(path.parent.name)
            parents[number] = int(fields[1])
            taken[number] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    total = 0.0
    for number, seconds in taken.items():
        ancestor = number
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        total += seconds if ancestor == os.getpid() else 0
    return total


def ready(arguments: argparse.Namespace) -> None:
    for way in arguments.ways:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
            command = [sys.executable, __file__, "once", arguments.model, arguments.plan, way]
            if arguments.longer:
                command.append("--longer")
            for cache in ("cold", "warm"):
                load = OtherLoad()
                done = subprocess.run(
                    command, env=environment, stdout=subprocess.PIPE, check=True, text=True
                )
                words = done.stdout.splitlines()[-1]
                print(f"{way}, {cache}: {words}; others' load {load.share():.0%}", flush=True)


class Stamps(BaseStreamer):  # type: ignore[misc]
    """Notes when each token came."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds: list[float] = []

    def put(self, _value: torch.Tensor) -> None:
        self.seconds.append(self._clock())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Round:
    """Milliseconds of a request: until its first token, of a step, and of all."""

    first_ms: float
    step_ms: float
    request_ms: float


def turns(arguments: argparse.Namespace) -> None:
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    load = OtherLoad()
    models = {}
    for way in arguments.ways:
        compile_by(way)
        models[way] = load_model(arguments.model, arguments.plan)
        generate_s(models[way], PROMPT, 8)
    rounds: dict[str, list[Round]] = {way: [] for way in arguments.ways}
    for number in range(arguments.rounds):
        first = number % len(models)
        for way in (arguments.ways * 2)[first : first + len(models)]:
            generate_s(models[way], PROMPT, 2)
            rounds[way].append(time_request(models[way], clock))
    report(rounds)
    print(f"others' load {load.share():.0%}, {torch.get_num_threads()} threads, {clock.__name__}")


def time_request(model: nn.Module, clock: Callable[[], float]) -> Round:
    stamps = Stamps(clock)
    started = clock()
    generate_s(model, PROMPT, NEW_TOKENS, stamps)
    taken_s = clock() - started
    _prompt, first, *rest = stamps.seconds
    steps = sorted(b - a for a, b in pairwise((first, *rest)))
    # A tenth of the steps is quicker: others, where they run, disturb most of them.
    return Round((first - started) * 1e3, steps[len(steps) // 10] * 1e3, taken_s * 1e3)


def report(rounds: Mapping[str, Sequence[Round]]) -> None:
    base, *others = rounds
    for way, found in rounds.items():
        steps = [each.step_ms for each in found]
        first_ms = min(each.first_ms for each in found)
        request_ms = statistics.median(each.request_ms for each in found)
        print(
            f"{way}: first token {first_ms:.1f} ms (least), step {statistics.median(steps):.2f} ms"
            f" (least {min(steps):.2f}), request {request_ms:.0f} ms",
            flush=True,
        )
    for way in others:
        pairs = list(zip(rounds[base], rounds[way], strict=True))
        step = mean_interval([other.step_ms / one.step_ms for one, other in pairs])
        request = mean_interval([other.request_ms / one.request_ms for one, other in pairs])
        print(f"{way} / {base}: step {words(step)}, request {words(request)}", flush=True)


def words(ratio: Interval) -> str:
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("ready", "turns", "once"))
    parser.add_argument("model")
    parser.add_argument("plan", choices=("int8", "mixed"))
    parser.add_argument("ways", nargs="*", default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--longer", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "once":
        be_ready(arguments, arguments.ways[0])
        return
    name = os.path.basename(os.path.normpath(arguments.model))
    print(f"{name}, {arguments.plan}, torch {torch.__version__}, {time.strftime('%F')}", flush=True)
    {"ready": ready, "turns": turns}[arguments.what](arguments)


if __name__ == "__main__":
    main()
