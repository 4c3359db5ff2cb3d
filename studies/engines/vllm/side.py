"""Log-probabilities and speed of models in vLLM: run by its own Python, see `compare.py`.

    VLLM/bin/python studies/engines/vllm/side.py PROMPTS.json OUT.json MODEL [MODEL ...]

Each model gets a process of its own, since vLLM keeps one for a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
NEW_TOKENS = 64
LONGEST = 256


def main() -> None:
    prompts, out, *models = sys.argv[1:]
    if len(models) > 1:
        found = {}
        for model in models:
            part = Path(out).with_suffix(".part.json")
            command = [sys.executable, __file__, prompts, str(part), model]
            subprocess.run(command, check=True, env=os.environ | SETTINGS)
            found |= json.loads(part.read_text())
            part.unlink()
        Path(out).write_text(json.dumps(found))
        return
    Path(out).write_text(json.dumps({models[0]: measure(models[0], prompts)}))


def measure(model: str, prompts: str) -> dict[str, object]:
    """Return what vLLM gives for each token of the prompts, and its new tokens a second."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(model, enforce_eager=True, dtype="bfloat16", max_model_len=LONGEST)
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(Path(prompts).read_text())]
    scores = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    each = []
    for output in llm.generate(asked, scores, use_tqdm=False):
        tokens = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        each.append([logprobs[token].logprob for token, logprobs in tokens])
    steps = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    rates = []
    for prompt in asked[:4]:
        start = time.perf_counter()
        llm.generate([prompt], steps, use_tqdm=False)
        rates.append(NEW_TOKENS / (time.perf_counter() - start))
    return {"logprobs": each, "tokens_per_s": sorted(rates)[len(rates) // 2]}


if __name__ == "__main__":
    main()
