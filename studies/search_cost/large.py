"""Search a model with a third of the memory that its weights take, and with all memory.

    python studies/search_cost/large.py FOLDER [--device cpu] [--hidden 512] [--layers 32]
        [--times 3] [--budget 4m] [--workload prefill=128,decode=32] [--candidates GLOB ...]
        [--characters 12000] [--increase 1%]

Makes a random Llama of 16 bits in FOLDER, in shards, with a tokenizer of single bytes, if nothing
is there. Databases that are there are continued. Searches the model by two commands, each in a new
process: with AUTOQUANT_DEVICE_MEMORY set to 1/times of the weights, which PyTorch keeps to on a GPU,
and without it but with the same limit of memory for plans. Then applies the best plan of the first
search with the limit and without it, loads and runs both, and compares them.

Prints what each stage took in seconds and memory, the plans, and whether they are the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
LIMIT = "AUTOQUANT_DEVICE_MEMORY"
DEFAULT_TEXT = ROOT / "autoquant/evaluators/texts/default.txt"


def make(folder: Path, hidden: int, layers: int, device: str) -> None:
    """Write the model and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate(letters)} | {"<end>": len(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=320,
        max_position_embeddings=2048,
        initializer_range=1.2 * hidden**-0.5,
        eos_token_id=len(letters),
        bos_token_id=len(letters),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")


def autoquant(*words: object, limit: int | None = None) -> str:
    """Run a command; return what it printed."""
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    settings.pop(LIMIT, None)
    if limit is not None:
        settings[LIMIT] = str(limit)
    command = [sys.executable, "-m", "autoquant", *map(str, words)]
    started = time.monotonic()
    done = subprocess.run(command, env=settings, text=True, capture_output=True, check=False)
    shown = " ".join(map(str, words))
    print(f"\n$ {'' if limit is None else f'{LIMIT}={limit} '}autoquant {shown}")
    print(done.stdout + done.stderr[-8000:], f"[{time.monotonic() - started:.0f} s]", flush=True)
    if done.returncode:
        sys.exit(f"it ended with {done.returncode}")
    return done.stdout


def stages(database: Path) -> None:
    """Print what each stage took."""
    import autoquant as package

    study = package.Study.open(database)
    memory = study.stage_memory()
    print(f"\n{database.name}: seconds, and most MiB")
    for stage, seconds in study.stage_seconds().items():
        sizes = {place: f"{size / MIB:.0f}" for place, size in memory.get(stage, {}).items()}
        print(f"  {stage:<12}{seconds:7.1f} s  {sizes}")


def best(database: Path) -> tuple[str, dict[str, str]]:
    """Return the fastest proven plan within the limits: its id, and the format of each layer.

    It is the recommended one, unless other programs disturbed its delivery.
    """
    import autoquant as package

    study = package.Study.open(database)
    rows = [row for row in study.rows() if row["within_limits"] and row["kind"] != "original"]
    if not rows:
        sys.exit(f"{database} has no plan within the limits")
    row = min(rows, key=lambda row: row["measured_request_ms"])
    plan, proof = study.plan(row["plan_id"]), study.proofs()[row["plan_id"]]
    print(
        f"\n{database.name}: {plan.plan_id} ({plan.label}): {plan.formats()}, loss"
        f" {proof.loss:.6f}, {proof.memory_bytes / MIB:.1f} MiB, {proof.request_ms:.1f} of"
        f" {proof.original_request_ms:.1f} ms; {proof.notes}"
    )
    return plan.plan_id, {layer.name: layer.format for layer in plan.layers}


def compare(capped: Path, free: Path) -> None:
    """Print what both searches found out about the same changes and plans."""
    import autoquant as package

    ours, theirs = (package.Study.open(database) for database in (capped, free))
    losses = [study.store.losses(*study_key(study)) for study in (ours, theirs)]
    both = losses[0].keys() & losses[1].keys()
    differ = max((abs(losses[0][key] - losses[1][key]) for key in both), default=0.0)
    print(f"\n{len(both)} scores of both searches differ by at most {differ:.3g}")
    proofs = ours.proofs(), theirs.proofs()
    for plan_id in proofs[0].keys() & proofs[1].keys():
        one, two = proofs[0][plan_id], proofs[1][plan_id]
        print(
            f"  {plan_id} ({ours.plan(plan_id).label}): loss {one.loss:.6f} and {two.loss:.6f},"
            f" request {one.request_ms:.0f} and {two.request_ms:.0f} ms, unquantized"
            f" {one.original_request_ms:.0f} (stand-in) and {two.original_request_ms:.0f} ms"
        )


def study_key(study: Any) -> tuple[str, str, str]:
    """Return what the scores of a study are kept under."""
    identity = study.facts.identity
    quality = f"{identity['quality']}-{identity['dtype']}"
    return study.facts.model_hash, quality, identity["method"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--times", type=float, default=3)
    parser.add_argument("--budget", default="4m")
    parser.add_argument("--workload", default="prefill=128,decode=32")
    parser.add_argument("--candidates", nargs="*", default=[])
    parser.add_argument("--increase", default="1%", help="the limit of perplexity")
    parser.add_argument("--characters", type=int, default=12_000, help="of the text")
    given = parser.parse_args()
    model = given.folder / "model"
    if not model.exists():
        make(model, given.hidden, given.layers, given.device)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    limit = int(size / given.times)
    print(f"weights {size / MIB:.0f} MiB, memory {limit / MIB:.0f} MiB")
    capped, free = given.folder / "capped.db", given.folder / "free.db"
    text = given.folder / "text.txt"
    text.write_text(DEFAULT_TEXT.read_text()[: given.characters])
    words = [
        "--eval-text",
        text,
        "--device",
        given.device,
        "--workload",
        given.workload,
        "--time-budget",
        given.budget,
        "--max-ppl-increase",
        given.increase,
    ]
    for name in given.candidates:
        words += ["--candidates", name]
    autoquant("--verbose", "search", model, "--db", capped, *words, limit=limit)
    import autoquant as package

    most = package.Study.open(capped).limits.max_memory_bytes
    autoquant("--verbose", "search", model, "--db", free, *words, "--max-memory", most)
    for database in (capped, free):
        stages(database)
    compare(capped, free)
    (plan_id, ours), (_, theirs) = best(capped), best(free)
    same = sum(ours[name] == theirs.get(name) for name in ours)
    print(f"\nthe same format in {same} of {len(ours)} layers")
    outs = [given.folder / "applied-capped", given.folder / "applied-free"]
    for out, most_bytes in zip(outs, (limit, None), strict=True):
        shutil.rmtree(out, ignore_errors=True)
        autoquant("apply", capped, "--plan", plan_id, "--out", out, limit=most_bytes)
        autoquant("generate", out, "--prompt", "The ", "--max-new-tokens", 16, limit=most_bytes)
    import torch

    ids = torch.arange(64, device=given.device).unsqueeze(0)
    with torch.no_grad():
        logits = [package.load(out)(ids).logits for out in outs]
    print("\nlogits of both are the same bit for bit:", torch.equal(*logits))


if __name__ == "__main__":
    main()
