"""Perplexity of a folder, computed with a few lines of its own: nothing of autoquant but
`autoquant.load` is used.

    python check_perplexity.py FOLDER --text FILE [--windows 24] [--first-characters 400000]
        [--float32]

Prints the perplexity per token over the first windows of 512 tokens, without overlap.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from pathlib import Path

import torch


def load(folder: Path) -> torch.nn.Module:
    """A folder that autoquant wrote, or a plain Hugging Face one."""
    if (folder / "autoquant.json").exists():
        import autoquant

        return autoquant.load(folder)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of every window's tokens but its first."""
    total = 0.0
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1].double()
        total -= torch.log_softmax(logits, -1).gather(1, window[1:, None]).mean().item()
    return math.exp(total / len(windows))


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--first-characters", type=int, default=400_000)
    parser.add_argument("--skip-characters", type=int, default=0)
    parser.add_argument(
        "--float32", action="store_true", help="compute in float32 (unquantized models only)"
    )
    parser.add_argument(
        "--parts", action="store_true", help="also the report part as autoquant deals it out"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = load(arguments.folder)
    if arguments.float32:
        model = model.float()
    start = arguments.skip_characters
    text = arguments.text.read_text(encoding="utf-8")[start : start + arguments.first_characters]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // 512 * 512].reshape(-1, 512)[: arguments.windows]
    result = {
        "folder": arguments.folder.name,
        "windows": len(windows),
        "perplexity": perplexity(model, windows),
    }
    if arguments.parts:
        from autoquant.evaluators.text import read_text

        result["report_perplexity"] = perplexity(
            model, read_text(arguments.text, tokenizer).windows["report"]
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
