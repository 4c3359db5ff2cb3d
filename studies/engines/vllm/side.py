"""Log-probabilities of models in vLLM: run by its own Python, see `compare.py`.

    VLLM/bin/python studies/engines/vllm/side.py PROMPTS.json OUT.json MODEL [MODEL ...]

Each model gets a process of its own, since vLLM keeps one for a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
LONGEST = 256


def main() -> None:
    prompts, out, *models = sys.argv[1:]
    if len(models) > 1:
        found = {}
        for model in models:
            part = Path(out).with_suffix(".part.json")
            command = [sys.executable, __file__, prompts, str(part), model]
            done = subprocess.run(command, env=os.environ | SETTINGS)
            if part.exists():
                found |= json.loads(part.read_text())
                part.unlink()
            else:
                found[model] = {"error": f"ended with {done.returncode}"}
        Path(out).write_text(json.dumps(found))
        return
    try:
        measured = measure(models[0], prompts)
    except Exception as error:  # noqa: BLE001 - told as what vLLM says
        measured = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    Path(out).write_text(json.dumps({models[0]: measured}))


def measure(model: str, prompts: str) -> dict[str, object]:
    """Return what vLLM gives for each token of the prompts."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(model, enforce_eager=True, dtype="bfloat16", max_model_len=LONGEST)
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(Path(prompts).read_text())]
    scores = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    each = []
    for output in llm.generate(asked, scores, use_tqdm=False):
        tokens = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        each.append([logprobs[token].logprob for token, logprobs in tokens])
    return {"logprobs": each}


if __name__ == "__main__":
    main()
