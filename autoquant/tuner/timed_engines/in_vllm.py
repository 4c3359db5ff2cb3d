"""Time one model in vLLM: run by the Python of vLLM's environment, which has no autoquant.

    VLLM/bin/python in_vllm.py '{"model": "FOLDER", "prompt": 512, "new": 128, ...}'

It loads the model, and writes one JSON object a line to what was its output: what it is, then for
each line of its input the seconds of a request and of its first token. Whatever vLLM itself prints
goes to the error output.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

_FEWEST_TOKENS = 1000
"""Token ids are drawn below this, or below the vocabulary's size if that is smaller."""


def main() -> None:
    """Load the model, then answer until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # processes that vLLM starts write there, too

    def answer(said: Mapping[str, Any]) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        request, version = _load(json.loads(sys.argv[1]))
        answer({"version": version})
        for _ in sys.stdin:
            answer({"first_s": request(1), "request_s": request(None)})
    except Exception as error:  # told to who started this
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


def _load(asked: Mapping[str, Any]) -> tuple[Callable[[int | None], float], str]:
    """Load a model, and return what times a request with some new tokens, and vLLM's version."""
    import vllm

    prompt, new, batch = asked["prompt"], asked["new"], asked["batch"]
    llm = vllm.LLM(
        asked["model"],
        dtype=asked["dtype"],
        skip_tokenizer_init=True,
        max_model_len=prompt + new,
        max_num_seqs=batch,
        enable_prefix_caching=False,  # else a prompt would be computed once
        **asked["settings"],
    )
    vocabulary = llm.model_config.get_vocab_size()
    draw = random.Random(0)
    prompts = [
        {
            "prompt_token_ids": [
                draw.randrange(min(vocabulary, _FEWEST_TOKENS)) for _ in range(prompt)
            ]
        }
        for _ in range(batch)
    ]

    def request(tokens: int | None) -> float:
        limits = vllm.SamplingParams(
            max_tokens=tokens or new, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(prompts, limits, use_tqdm=False)
        return time.perf_counter() - start

    request(None)  # warms up
    return request, vllm.__version__


if __name__ == "__main__":
    main()
