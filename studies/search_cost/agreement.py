"""Compare how far compiled code is from eager code with how far rounding alone moves the outputs.

    python studies/search_cost/agreement.py [--device cuda] [--depths 4 16 48]

Each model is a random Llama in bfloat16 whose linears all have one format. `noise` is what
`autoquant.runtime.agreement` takes for rounding: the eager model with the input of each linear
rounded otherwise.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from autoquant.candidates import A16, get_format
from autoquant.candidates.routed import RoutedWeight
from autoquant.models import from_module
from autoquant.records import Workload
from autoquant.runtime.agreement import _RoundedOtherwise, relative_error
from autoquant.runtime.phases import make_phases
from autoquant.runtime.prepare import prepare

FORMATS = ("bfloat16/plain", "float8-row/plain", "int8-row/plain")
WORKLOAD = Workload.parse("prefill=64,decode=4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depths", type=int, nargs="*", default=[4, 16, 48])
    options = parser.parse_args()
    print("| blocks | format, kernel | phase | compiled | noise |")
    print("| --- | --- | --- | --- | --- |")
    for depth in options.depths:
        for format_id in FORMATS:
            compare(depth, format_id, options.device)


def compare(depth: int, format_id: str, device: str) -> None:
    """Print a line for each phase of one model."""
    module = model(depth).to(device)
    kernel = quantize(module, format_id) if format_id != FORMATS[0] else ""
    phases = make_phases(from_module(prepare(module)), WORKLOAD, compiled=True)
    for phase in WORKLOAD.phases:
        phases.reset(phase.name)
        expected = phases.run_eager(phase.name)
        phases.reset(phase.name)
        compiled = relative_error(phases.run(phase.name), expected)
        phases.reset(phase.name)
        with _RoundedOtherwise():
            noise = relative_error(phases.run_eager(phase.name), expected)
        name = ", ".join(filter(None, (format_id, kernel)))
        print(f"| {depth} | {name} | {phase.name} | {compiled:.3f} | {noise:.3f} |", flush=True)


def model(depth: int) -> LlamaForCausalLM:
    """Return a random Llama of 128 channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)


def quantize(module: LlamaForCausalLM, format_id: str) -> str:
    """Quantize all linears of the blocks; return the kernel, which rounds activations."""
    fmt = get_format(format_id)
    kernel = next(each.id for each in fmt.kernels if each.numerics != A16)
    for linear in [each for each in module.model.layers.modules() if type(each) is nn.Linear]:
        stored = fmt.store(linear.weight)
        weight = RoutedWeight(stored, format_id, ((None, kernel),), torch.bfloat16)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return kernel


if __name__ == "__main__":
    main()
