"""Hold what llama.cpp computes from a GGUF against the same numbers in transformers.

    python studies/engines/gguf/logprobs.py MODEL FILE.gguf TEXT

MODEL is the unquantized Hugging Face folder. xllamacpp gives log-probabilities of a token that it
generates only. So each token of TEXT is asked for, after all those before it, and counts where it
is among the 200 likeliest. transformers reads the GGUF, too, and multiplies in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from llama_cpp import ask, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS, FIRST, LIKELIEST = 256, 32, 200


def main(model: str, file: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"][:TOKENS]
    folder, name = str(Path(file).parent), Path(file).name
    of_plan = logprobs(AutoModelForCausalLM.from_pretrained(folder, gguf_file=name), ids)
    original = logprobs(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), ids)
    server = serve(file)
    engine = {}
    for place in range(FIRST, len(ids)):
        options = {"n_predict": 1, "logprobs": LIKELIEST, "cache_prompt": True}
        answer = ask(server, ids[:place], **options)["choices"][0]["logprobs"]["content"][0]
        found = {each["id"]: each["logprob"] for each in answer["top_logprobs"]}
        if ids[place] in found:
            engine[place] = found[ids[place]]
    places = list(engine)
    served = torch.tensor(list(engine.values()))
    print(f"{len(places)} of {len(ids) - FIRST} tokens are among the {LIKELIEST} likeliest")
    print(f"llama.cpp and the plan's numbers: {apart(served, of_plan[places]):.4f} apart")
    print(f"llama.cpp and the unquantized model: {apart(served, original[places]):.4f} apart")
    print(f"plan's numbers and unquantized: {apart(of_plan[places], original[places]):.4f} apart")
    for name, found in (
        ("llama.cpp", served),
        ("plan", of_plan[places]),
        ("unquantized", original[places]),
    ):
        print(f"perplexity of these tokens, {name}: {(-found.mean()).exp():.3f}")


@torch.no_grad()
def logprobs(module: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Log-probability of each token after those before it, 0 for the first."""
    tokens = torch.tensor([ids])
    found = module(tokens).logits[0, :-1].float().log_softmax(-1)
    return torch.cat((torch.zeros(1), found.gather(1, tokens[0, 1:, None])[:, 0]))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean())


if __name__ == "__main__":
    main(*sys.argv[1:])
