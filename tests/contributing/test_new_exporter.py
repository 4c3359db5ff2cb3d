"""A new exporter: one function over a model that a plan was applied to.

A quantized weight says by itself what it holds: its format, its stored tensor, and with
`dequantize()` the numbers that its kernels multiply with. An exporter needs nothing else, and no
format needs to know it. One that `autoquant export` offers is a `Writer` of `delivery/targets`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.tiny_models import tiny_llama
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from autoquant.candidates import get_format
from autoquant.candidates.routed import RoutedWeight
from autoquant.records import RouteStep

ROUTE = (RouteStep(upper_m=None, kernel="dequantize-matmul"),)


def export_floats(module: nn.Module, folder: Path) -> list[str]:
    """Write a model as plain floats with its quantized weights' numbers, for any tool to read.

    Returns:
        Names of the files written.
    """
    tensors = {}
    for name, parameter in module.named_parameters():
        stored = parameter.data
        numbers = stored.dequantize() if isinstance(stored, RoutedWeight) else stored
        tensors[name] = numbers.to(parameter.dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    module.config.save_pretrained(folder)
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def quantized():
    """A language model whose linears are int8."""
    fmt, model = get_format("int8-row/plain"), tiny_llama()
    for child in model.modules():
        if isinstance(child, nn.Linear):
            weight = child.weight.data
            routed = RoutedWeight.wrap(fmt.store(weight), fmt.id, ROUTE, weight.dtype)
            child.weight = nn.Parameter(routed, requires_grad=False)
    return model


def test_another_tool_reads_what_the_exporter_wrote(quantized, tmp_path):
    assert export_floats(quantized, tmp_path) == ["config.json", "model.safetensors"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, quantized(ids).logits, rtol=0.05, atol=0.05)
    weight = again.model.layers[0].mlp.up_proj.weight
    assert type(weight.data) is torch.Tensor
    assert torch.unique(weight[0]).numel() <= 255
