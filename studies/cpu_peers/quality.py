"""Perplexity of models on the text that autoquant ships, each read by transformers.

    python studies/cpu_peers/quality.py --tokenizer ORIGINAL MODEL|FILE.gguf [...]

A GGUF file is dequantized, so what is judged is its weights: llama.cpp also rounds activations.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import autoquant  # noqa: F401 - transformers then reads what `autoquant apply` writes
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.text import DEFAULT_TEXT, read_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("models", nargs="+", type=Path)
    options = parser.parse_args()
    parts = read_text(DEFAULT_TEXT, AutoTokenizer.from_pretrained(options.tokenizer))
    quality = TextQuality(parts, "cpu")
    print("| model | perplexity | MiB |")
    print("| --- | --- | --- |")
    for path in options.models:
        losses = quality.losses(loaded(path), "report")
        files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.pt")]
        size = sum(file.stat().st_size for file in files) / 2**20
        print(f"| {path.name} | {math.exp(fmean(losses)):.3f} | {size:.0f} |", flush=True)


def loaded(path: Path) -> torch.nn.Module:
    """Return the model of a folder or of a GGUF file, in bfloat16."""
    if path.is_file():
        module = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16
        )
    else:
        module = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return module.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
