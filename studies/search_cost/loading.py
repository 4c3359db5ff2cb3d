"""Time the loading of a model from several kinds of files, by this code and by that of before.

    python studies/search_cost/loading.py FOLDER --before CHECKOUT [--rounds 5] [--layers 14]
        [--device cpu] [--shards-only]

Makes a random Llama of 16 bits in FOLDER, if nothing is there: in shards, as a state dict, and with
int8 in all linears but the head. Each round loads all of them in three new processes, in turn: by
CHECKOUT, a copy of the project as it was; by this code with nothing remembered; and once more by
this code, which remembers what it hashed in a first round that is not counted. What a process
imports, and its first load of a tiny model, is not counted. The files are in the page cache of the
system, since they were read before.

Prints medians, with the least beside them, and medians of the ratios of each round, with their
least and greatest.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
TINY = ROOT / "tests/golden/model"
WAYS = ("before", "nothing remembered", "remembered")
PARTS = {
    "hash": (
        "models.huggingface.content_hash",
        "models.remembered.FileDigests.content_hash",
        "models.content_hash",
    ),
    "made by transformers": ("models.huggingface.made", "models.huggingface.filled"),
    "moved": ("models.huggingface.moved",),
    "embeddings found": ("models.huggingface.embedding_rows",),
    "read": ("export.checkpoint._read_stored",),
    "kernels checked": ("export.on_disk.check_kernels",),
}
"""Functions, some of one version only, that belong to a part of the time."""


def loads(folder: Path, device: str, shards_only: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    import autoquant
    from autoquant.models import load_model

    shards = {"folder": lambda: load_model(folder / "shards", device=device)}
    return (
        shards
        if shards_only
        else shards
        | {
            "folder, as float32": lambda: load_model(
                folder / "shards", device=device, dtype="fp32"
            ),
            "state dict": lambda: load_model(folder / "state" / "weights.pt", device=device),
            "applied folder, int8": lambda: autoquant.load(folder / "int8", device=device),
        }
    )


def watch(name: str, seconds: dict[str, float], part: str) -> None:
    """Have a function add its time to a part, if this version has it."""
    import importlib

    *path, leaf = name.split(".")
    owner: Any = importlib.import_module("autoquant")
    for step in path:
        owner = getattr(owner, step, None)
    function = getattr(owner, leaf, None)
    if function is None:
        return

    @functools.wraps(function)
    def timed(*args: object, **kwargs: object) -> object:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - started

    setattr(owner, leaf, timed)


def time_here(arguments: argparse.Namespace) -> None:
    """Print the seconds of each load in this process, with their parts, as JSON."""
    import torch

    from autoquant.cache import cache_folder
    from autoquant.delivery import on_disk  # noqa: F401  watched
    from autoquant.models import load_model

    device = arguments.device
    load_model(TINY, device=device)
    parts: dict[str, float] = defaultdict(float)
    for part, names in PARTS.items():
        for name in names:
            watch(name, parts, part)
    found = {}
    for name, load in loads(arguments.folder, device, arguments.shards_only).items():
        parts.clear()
        if arguments.forget:
            shutil.rmtree(cache_folder() / "digests", ignore_errors=True)
        started = time.perf_counter()
        loaded = load()
        if device != "cpu":
            torch.cuda.synchronize()
        found[name] = {"all": time.perf_counter() - started, **parts}
        found[name]["content"] = getattr(loaded, "content_hash", "")
        del loaded
    print(json.dumps(found))


def timed_by(way: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What `time_here` prints in a new process of one version."""
    root = arguments.before if way == "before" else ROOT
    cache = arguments.folder / f"cache of {way}"
    found = os.pathsep.join((str(root), *filter(None, [os.environ.get("PYTHONPATH")])))
    environment = os.environ | {"PYTHONPATH": found, "AUTOQUANT_CACHE": str(cache)}
    command = [sys.executable, str(HERE), str(arguments.folder), "--device", arguments.device]
    command += ["--forget"] if way == "nothing remembered" else []
    command += ["--shards-only"] if arguments.shards_only else []
    done = subprocess.run(
        [*command, "--here"],
        env=environment,
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def make_files(folder: Path, layers: int, shards_only: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    shards, state = folder / "shards", folder / "state"
    model.save_pretrained(shards, max_shard_size="400MB")
    for path in TINY.glob("token*"):
        shutil.copy(path, shards)
    if shards_only:
        return
    state.mkdir()
    for path in (shards / "config.json", *shards.glob("token*")):
        shutil.copy(path, state)
    torch.save(model.state_dict(), state / "weights.pt")
    write_int8(shards, folder / "int8")


def write_int8(source: Path, target: Path) -> None:
    from autoquant.delivery import applier, checkpoint
    from autoquant.models import load_model
    from autoquant.records import LayerChoice, LinearShape, Plan, Prediction, RouteStep

    loaded = load_model(source)
    layers = []
    for name, weight in loaded.module.named_parameters():
        if name.endswith("_proj.weight"):
            shape = LinearShape(n=weight.shape[0], k=weight.shape[1], bias=False, dtype="bfloat16")
            choice = LayerChoice(
                name=name.removesuffix(".weight"),
                shape=shape,
                format="int8-row/plain",
                route=(RouteStep(upper_m=None, kernel=int8_kernel(shape)),),
                numerics="",
                latency_us={},
                memory_bytes=0,
                loss=0.0,
                parameters=(name,),
            )
            layers.append(choice)
    plan = Plan(
        plan_id="int8",
        study_id="loading",
        label="int8",
        kind="front",
        model_hash=loaded.content_hash,
        dtype="bfloat16",
        layers=tuple(layers),
        prediction=Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=0),
    )
    applier.apply(plan, loaded.module)
    target.mkdir()
    checkpoint.write(loaded, plan, target)


def int8_kernel(shape: Any) -> str:
    """The first kernel that computes few and many rows on this machine."""
    from autoquant.candidates import get_format

    fmt = get_format("int8-row/plain")
    for kernel in fmt.kernels:
        if not any(fmt.unsupported_reason(kernel, shape, rows, "cpu") for rows in (1, 33)):
            return str(kernel.id)
    raise SystemExit("no kernel of int8-row/plain works here")


def report(rounds: list[dict[str, dict[str, dict[str, Any]]]]) -> None:
    for name in rounds[0]["before"]:
        contents = {each[way][name].pop("content") for each in rounds for way in WAYS}
        assert len(contents) == 1, f"{name}: the hashes differ, {contents}"
        print(f"\n{name} {contents.pop()}")
        for way in WAYS:
            found = [each[way][name] for each in rounds]
            parts = sorted({part for each in found for part in each} - {"all"})
            words = [
                f"{part} {statistics.median(each.get(part, 0.0) for each in found):.2f}"
                f" ({min(each.get(part, 0.0) for each in found):.2f})"
                for part in ("all", *parts)
            ]
            ratios = [each["before"][name]["all"] / each[way][name]["all"] for each in rounds]
            print(
                f"  {way}: {', '.join(words)} s; {statistics.median(ratios):.2f} times as fast"
                f" ({min(ratios):.2f} to {max(ratios):.2f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shards-only", action="store_true", help="the first kind alone")
    parser.add_argument("--forget", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        time_here(arguments)
        return
    if arguments.before is None:
        parser.error("--before is missing: a copy of the project as it was")
    arguments.folder = arguments.folder.resolve()
    arguments.before = arguments.before.resolve()
    if not arguments.folder.exists():
        arguments.folder.mkdir(parents=True)
        make_files(arguments.folder, arguments.layers, arguments.shards_only)
        time.sleep(3)  # what was just written is not remembered
    size = sum(path.stat().st_size for path in (arguments.folder / "shards").iterdir())
    names = ("torch", "torchao", "transformers", "safetensors")
    print(platform.processor() or platform.machine(), os.cpu_count(), "cores,", time.strftime("%F"))
    print(", ".join(f"{name} {metadata.version(name)}" for name in names))
    print(f"{size / 1e9:.2f} GB in {arguments.rounds} rounds on {arguments.device}")
    rounds = [{way: timed_by(way, arguments) for way in WAYS} for _ in range(arguments.rounds + 1)]
    report(rounds[1:])  # the first one reads the files, and hashes what is remembered


if __name__ == "__main__":
    main()
