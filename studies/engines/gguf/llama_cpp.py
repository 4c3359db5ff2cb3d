"""Run GGUFs in llama.cpp, by the package xllamacpp: tokens a second, and what the model says.

    python studies/engines/gguf/llama_cpp.py OUT.txt NAME=FILE.gguf [NAME=FILE.gguf ...]

The first file is what the others are compared with: the mean difference of the log-probability of
the token that it found likeliest, along its own text. Files take turns; the median counts.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import xllamacpp

PROMPT = "The history of the steam engine begins with"
LONG = PROMPT + " the pumps of the mines," * 60
TOKENS, ROUNDS, THREADS = 64, 3, 2


def serve(path: str) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel = 1024, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = THREADS
    settings.warmup = True
    return xllamacpp.Server(settings)


def ask(server: Any, prompt: str | list[int], **more: Any) -> dict[str, Any]:
    request = {"prompt": prompt, "temperature": 0, "n_predict": TOKENS, "cache_prompt": False}
    answer: dict[str, Any] = server.handle_completions({**request, **more})
    return answer


def main(out: str, *pairs: str) -> None:
    servers = {name: serve(path) for name, path in (pair.split("=", 1) for pair in pairs)}
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    said: dict[str, dict[str, Any]] = {}
    for _ in range(ROUNDS):
        for name, server in servers.items():
            timed = ask(server, LONG)["timings"]
            speeds[name].append((timed["prompt_per_second"], timed["predicted_per_second"]))
    for name, server in servers.items():
        said[name] = ask(server, PROMPT, logprobs=20)["choices"][0]
    first = next(iter(said.values()))
    lines = [
        f"xllamacpp {xllamacpp.__version__}, {THREADS} threads, {ROUNDS} rounds of {TOKENS} tokens"
    ]
    for name, pair in zip(said, pairs, strict=True):
        prompt, token = (statistics.median(each) for each in zip(*speeds[name], strict=True))
        size = Path(pair.split("=", 1)[1]).stat().st_size / 2**20
        lines.append(
            f"{name}: {size:.0f} MiB, prompt {prompt:.0f} and text {token:.1f} tokens a second,"
            f" {likeness(first, said[name])}\n    {said[name]['text']!r}"
        )
    Path(out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def likeness(one: dict[str, Any], other: dict[str, Any]) -> str:
    """How far two texts agree, and how far log-probabilities are apart until they part."""
    apart = []
    pairs = zip(*(each["logprobs"]["content"] for each in (one, other)), strict=False)
    for mine, others in pairs:
        found = {each["id"]: each["logprob"] for each in others["top_logprobs"]}
        if mine["id"] in found:
            apart.append(abs(mine["logprob"] - found[mine["id"]]))
        if mine["id"] != others["id"]:
            break
    mean = sum(apart) / max(len(apart), 1)
    return f"{len(apart)} tokens alike, log-probabilities {mean:.3f} apart"


if __name__ == "__main__":
    main(*sys.argv[1:])
