"""Runs requests of one model in one engine: reads the seed of a prompt, prints its times as JSON.

    python studies/cpu_peers/worker.py llama.cpp|openvino|autoquant MODEL PROMPT_TOKENS NEW_TOKENS

It needs the package of its engine alone: `xllamacpp`, `openvino-genai` or `autoquant`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

THREADS = 2
SMALLEST_VOCABULARY = 8000
Request = Callable[[list[int], int], tuple[float, float]]
"""Maps prompt ids and the number of new tokens to the milliseconds until the first, and of all."""


def llama_cpp(model: str) -> Request:
    """Return requests to llama.cpp's server, called in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = 1024, 512, 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(params)

    def request(ids: list[int], new: int) -> tuple[float, float]:
        asked = {
            "prompt": ids,
            "n_predict": new,
            "cache_prompt": False,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer: Any = server.handle_completions(asked)
        times = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        # The first token comes with the prompt; llama.cpp counts it among the others.
        step_ms = times["predicted_ms"] / times["predicted_n"]
        return times["prompt_ms"] + step_ms, times["prompt_ms"] + times["predicted_ms"]

    return request


def openvino(model: str) -> Request:
    """Return requests to OpenVINO GenAI, which reads a GGUF file."""
    import numpy
    from openvino import Tensor
    from openvino_genai import GenerationConfig, LLMPipeline, SchedulerConfig, TokenizedInputs

    scheduler = SchedulerConfig()
    scheduler.enable_prefix_caching = False
    pipeline = LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=THREADS, scheduler_config=scheduler)

    def request(ids: list[int], new: int) -> tuple[float, float]:
        config = GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample = True, False
        tokens = numpy.array([ids], dtype=numpy.int64)
        inputs = TokenizedInputs(Tensor(tokens), Tensor(numpy.ones_like(tokens)))
        metrics = pipeline.generate(inputs, config).perf_metrics
        return metrics.get_ttft().mean, metrics.get_generate_duration().mean

    return request


def autoquant(model: str) -> Request:
    """Return requests to `generate`, of a folder that `autoquant apply` wrote or of another."""
    import torch
    from transformers import AutoModelForCausalLM

    import autoquant

    torch.set_num_threads(THREADS)
    module = autoquant.prepare(AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval())

    def one(ids: list[int], new: int) -> float:
        prompt = torch.tensor([ids])
        start = time.perf_counter()
        module.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return 1e3 * (time.perf_counter() - start)

    def request(ids: list[int], new: int) -> tuple[float, float]:
        return one(ids, 1), one(ids, new)

    return request


ENGINES = {"llama.cpp": llama_cpp, "openvino": openvino, "autoquant": autoquant}


def main() -> None:
    engine, model, prompt, new = sys.argv[1:]
    request = ENGINES[engine](model)
    for line in sys.stdin:
        chosen = random.Random(int(line))
        ids = [chosen.randrange(SMALLEST_VOCABULARY) for _ in range(int(prompt))]
        first_ms, all_ms = request(ids, int(new))
        step_ms = (all_ms - first_ms) / (int(new) - 1)
        print("RESULT", json.dumps([first_ms, step_ms, all_ms]), flush=True)


if __name__ == "__main__":
    main()
