"""What OpenVINO GenAI makes of GGUFs: python reads.py MODEL TEXT FILE.gguf ...

Needs openvino-genai, transformers and gguf in one environment. For each file it prints the mean
divergence (nats a token) of OpenVINO's log-probabilities from those of transformers with the file's
own numbers in float32, and of these from the unquantized model's, or what OpenVINO says of the file.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 256


def openvino_logits(file: Path, ids: np.ndarray) -> np.ndarray:
    """Return the logits [tokens, vocabulary] of the model that the reader makes of a GGUF."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / file.name
        place.symlink_to(file.resolve())
        openvino_genai.LLMPipeline(place, "CPU", enable_save_ov_model=True)
        made = openvino.Core().read_model(Path(folder) / "openvino_model.xml")
        # Without this hint it computes in bfloat16 where the CPU can.
        request = openvino.compile_model(
            made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        ).create_infer_request()
    given = {
        "input_ids": ids[None],
        "attention_mask": np.ones_like(ids)[None],
        "position_ids": np.arange(len(ids))[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    found = request.infer(given)
    return np.array(found[request.model_outputs[0]][0])


def logits_of(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].float().numpy()


def divergence(of: np.ndarray, other: np.ndarray) -> float:
    """Return the mean KL divergence of `other` from `of`."""
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (of, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    model, text, *files = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = np.array(tokenizer(Path(text).read_text(encoding="utf-8")[:20000])["input_ids"][:TOKENS])
    original = logits_of(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), ids)
    print(f"openvino-genai {openvino_genai.__version__}, {len(ids)} tokens")
    for name in files:
        file = Path(name)
        try:
            there = openvino_logits(file, ids)
        except RuntimeError as error:
            print(f"{file.parent.name}/{file.name}: refused: {str(error).splitlines()[-1]}")
            continue
        read = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        own = logits_of(read, ids)
        print(
            f"{file.parent.name}/{file.name}: OpenVINO from the file's numbers"
            f" {divergence(own, there):.3g}, these from the unquantized model"
            f" {divergence(original, own):.3g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
