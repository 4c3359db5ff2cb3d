"""Time a model in the loops that users run: `generate` and `torch.compile`, quantized and not, in
turn.

The model has the shapes of Llama-3-8B and random weights, whose residual branches are scaled down
so that activations stay finite. Every linear gets one format; siblings are computed as one.

    python studies/users_loop/users_loop.py --layers 8 --vocabulary 8192 --prompt 1024
        --new 128 --out OUT
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from autoquant.candidates import get_format
from autoquant.candidates.joined import join
from autoquant.candidates.linears import take_apart
from autoquant.candidates.routed import RoutedWeight
from autoquant.devices import backend
from autoquant.records import RouteStep
from autoquant.runtime.compiled import shallow_copy
from autoquant.runtime.prepare import prepare

FORMATS = {
    "int4": ("int4-g128/tiled", ((16, "rows"), (None, "unpack-scaled-mm"))),
    "float8": ("float8-row/plain", ((16, "rows"), (None, "scaled-mm"))),
}
SIBLINGS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


def make_model(layers: int, vocabulary: int, device: str) -> nn.Module:
    """Return the unquantized model."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(0.2)
        model.lm_head.weight.mul_(3)
    return model.eval().requires_grad_(False)


def quantized(model: nn.Module, name: str) -> nn.Module:
    """Return a copy of `model` that shares what is not quantized; every linear has the format."""
    format_id, steps = FORMATS[name]
    fmt, route = (
        get_format(format_id),
        tuple(RouteStep(upper_m=upper, kernel=kernel) for upper, kernel in steps),
    )
    copy = shallow_copy(model)

    def wrapped(linear: Any) -> RoutedWeight:
        return RoutedWeight.wrap(fmt.store(linear.weight), fmt.id, route, linear.weight.dtype)

    def put(linear: Any, weight: torch.Tensor) -> None:
        linear.weight = nn.Parameter(weight, requires_grad=False)

    for layer in copy.model.layers:
        for owner, members in SIBLINGS:
            linears = [getattr(getattr(layer, owner), member) for member in members]
            for linear, weight in zip(
                linears, join([wrapped(one) for one in linears]), strict=True
            ):
                put(linear, weight)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            put(linear, wrapped(linear))
    put(copy.lm_head, wrapped(copy.lm_head))
    return copy


class Row:
    """One way to run one model.

    Args:
        call: Takes a number of new tokens and runs a whole request.
    """

    def __init__(self, name: str, call: Callable[[int], Any], new: int) -> None:
        self.name, self._call, self._new = name, call, new
        self.first_s: list[float] = []
        self.request_s: list[float] = []
        started = time.perf_counter()
        call(1)
        torch.cuda.synchronize()
        self.ready_s = time.perf_counter() - started
        self.tokens = call(new)
        self.whole_ready_s = time.perf_counter() - started
        call(new)
        print(
            f"{name}: ready after {self.ready_s:.1f} s, whole request {self.whole_ready_s:.1f} s",
            flush=True,
        )

    def round(self) -> None:
        for times, new in ((self.first_s, 1), (self.request_s, self._new)):
            torch.cuda.synchronize()
            started = time.perf_counter()
            self._call(new)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)

    def result(self) -> dict[str, Any]:
        first_ms, request_ms = (
            1e3 * statistics.median(times) for times in (self.first_s, self.request_s)
        )
        return {
            "row": self.name,
            "first_token_ms": first_ms,
            "request_ms": request_ms,
            "step_ms": (request_ms - first_ms) / (self._new - 1),
            "request_rounds_ms": [1e3 * time_s for time_s in self.request_s],
            "ready_s": self.ready_s,
        }


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}


def generating(model: Any, ids: torch.Tensor, **settings: Any) -> Callable[[int], Any]:
    mask = torch.ones_like(ids)

    def call(new: int) -> Any:
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            **{"do_sample": False, **settings},
        )

    return call


def compiled_steps(
    model: Any, ids: torch.Tensor, longest: int, **settings: Any
) -> Callable[[int], Any]:
    """Return a loop of the user's own.

    An eager prompt, then `torch.compile(model)` for each token.
    """
    forward = torch.compile(model, fullgraph=True, dynamic=False, **settings)

    @torch.no_grad()
    def call(new: int) -> Any:
        cache = cache_of()
        cache.reset()
        tokens = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        found = [tokens]
        for step in range(new - 1):
            place = torch.full((1, 1), ids.shape[1] + step, device=ids.device)
            if settings:
                torch.compiler.cudagraph_mark_step_begin()
            logits = forward(
                tokens, past_key_values=cache, position_ids=place, logits_to_keep=1
            ).logits
            tokens = logits[:, -1:].argmax(-1)
            found.append(tokens)
        return torch.cat(found, dim=1)

    kept: list[Any] = []

    def cache_of() -> Any:
        if not kept:
            kept.append(StaticCache(config=model.config, max_cache_len=longest))
        return kept[0]

    return call


LOOPS = {
    "fast": "autoquant generate",
    "sampled": "autoquant generate, sampled",
    "plain": "transformers generate",
    "static": "transformers generate, static cache",
    "compile": "torch.compile",
    "reduce-overhead": "torch.compile, reduce-overhead",
}


def make_loop(
    loop: str, models: dict[str, nn.Module], ids: torch.Tensor, longest: int
) -> Callable[[int], Any]:
    """Return what runs a request of so many new tokens in one of `LOOPS`."""
    if loop == "fast":
        return generating(models["fast"], ids)
    if loop == "sampled":
        return generating(models["fast"], ids, **SAMPLED)
    if loop == "plain":
        return generating(models["plain"], ids)
    if loop == "static":
        return generating(models["plain"], ids, cache_implementation="static")
    return compiled_steps(
        models["plain"], ids, longest, **({} if loop == "compile" else {"mode": loop})
    )


@contextmanager
def busy_host(processes: int) -> Iterator[None]:
    """Run so many processes that do nothing but use a core."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", nargs="*", default=["int4"])
    parser.add_argument("--loops", nargs="*", default=list(LOOPS), choices=list(LOOPS))
    parser.add_argument("--ends", action="store_true", help="have a token that ends a sequence")
    parser.add_argument("--busy", type=int, default=0, help="processes that keep the host busy")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.recompile_limit = (
        64  # every model compiles the same functions of transformers
    )
    model = make_model(options.layers, options.vocabulary, "cuda")
    if options.ends:
        model.generation_config.eos_token_id = [2]
    ids = torch.randint(1, options.vocabulary, (options.batch, options.prompt), device="cuda")
    models = {"bf16": model} | {name: quantized(model, name) for name in options.formats}
    rows = []
    for name, each in models.items():
        prepared = {"plain": take_apart(shallow_copy(each)), "fast": prepare(shallow_copy(each))}
        for loop in options.loops:
            try:
                row = f"{name} {LOOPS[loop]}"
                rows.append(
                    Row(
                        row,
                        make_loop(loop, prepared, ids, options.prompt + options.new),
                        options.new,
                    )
                )
            except Exception as error:  # noqa: BLE001 - a loop that cannot run is a result, too
                print(f"{row} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
    with busy_host(options.busy):
        for _ in range(options.rounds):
            for row in rows:
                row.round()
    results = [row.result() for row in rows]
    settings = {key: str(value) for key, value in vars(options).items()}
    device = backend("cuda").fingerprint()
    about = {
        "device": device.name,
        "versions": dict(device.versions),
        "date": time.strftime("%Y-%m-%d"),
    }
    sizes = (options.layers, options.batch, options.prompt, options.new)
    name = f"rows-{'-'.join(map(str, sizes))}.json"
    (options.out / name).write_text(
        json.dumps({**about, "settings": settings, "rows": results}, indent=1)
    )
    for result in results:
        print(
            "{row:48s} first {first_token_ms:8.2f} ms  step {step_ms:7.3f} ms  "
            "request {request_ms:9.2f} ms".format(**result)
        )
    agree(rows)


def agree(rows: list[Row]) -> None:
    """Say how many greedy tokens each row has in common with the first row of its model."""
    firsts: dict[str, Row] = {}
    for row in rows:
        name = row.name.split()[0]
        first = firsts.setdefault(name, row)
        if "torch.compile" in row.name or "sampled" in row.name or first is row:
            continue
        same = (row.tokens == first.tokens).long().cumprod(-1).sum(-1)
        print(f"{row.name}: greedy tokens the same up to {same.tolist()} of {row.tokens.shape[1]}")


if __name__ == "__main__":
    main()
