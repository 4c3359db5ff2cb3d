"""Peak memory of a search, against the model's size and what torch, transformers and the compiler
take by themselves.

python memory.py -- autoquant search MODEL ...   runs the command, prints its largest process's MiB
python memory.py --baseline                      the same for a process that compiles a tiny model
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

BASELINE = """
import logging, warnings; warnings.simplefilter('ignore'); logging.disable(logging.WARNING)
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import autoquant.tuner.driver
from autoquant.candidates import known_formats; known_formats()
from autoquant.runtime.request import warm_up
from autoquant.runtime.phases import make_phases
from autoquant.records import Workload
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, vocab_size=64)
model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
workload = Workload.parse('prefill=16,decode=4')
warm_up(make_phases(model, 'causal_lm', workload, device='cpu', compiled=True))
"""


def main() -> None:
    """Print one JSON object."""
    arguments = sys.argv[1:]
    command = [sys.executable, "-c", BASELINE] if arguments == ["--baseline"] else arguments[1:]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps({"exit_code": code, "largest_process_peak_mib": round(peak)}))


if __name__ == "__main__":
    main()
