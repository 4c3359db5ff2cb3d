"""Write one program that ExecuTorch runs through XNNPACK.

Each quantized linear becomes torchao's tensor of integers whose activations are rounded to int8 for
each token. `torch.export` traces the whole model in float32, and XNNPACK takes what it can. The
program holds the integers and the scales of a layer as they are here: int8, or two of 4 bits a
byte with the even column low; scales of rows in float32, of groups in bfloat16.

Source: executorch 1.5.1, `backends/xnnpack/operators/node_visitor.py`; torchao 0.18,
`quantization/quantize_/workflows/intx/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torchao.quantization import IntxUnpackedToInt8Tensor

from autoquant.candidates.linears import ApartLinear
from autoquant.candidates.neutral import NeutralWeight
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.comparison import Inputs
from autoquant.delivery.likeness import read_inputs
from autoquant.delivery.targets.base import Contents, ExportedLayer, Writer
from autoquant.engines.targets import EXECUTORCH
from autoquant.errors import CheckpointError, PlanError, first_line
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy
from autoquant.models.loaded import is_causal_lm
from autoquant.models.outputs import output_tensor, run_on_tokens
from autoquant.models.quiet import quiet
from autoquant.models.trust import Trust

_FILE = "model.pte"
_MOST_TOKENS = 512
"""Memory for the logits of as many tokens is set aside in the program."""
_BITS = {"8da8w": 8, "8da4w": 4}


class ExecutorchWriter(Writer):
    """Writes programs of ExecuTorch."""

    target = EXECUTORCH
    reader = ("executorch",)
    shows_weights = False
    written = "Each layer's integers and scales were found in the program: they are the plan's."

    def check_given(self) -> None:
        if missing := self.missing():
            raise PlanError(
                f"{missing[0]} is not installed, which makes the program: pip install {missing[0]}"
            )

    def check(self, loaded: LoadedModel) -> None:
        if loaded.stream is not None:
            raise PlanError(
                "a program for ExecuTorch is made of the whole model, which does not fit here"
            )
        others = [each for each in _leaves(read_inputs(loaded)) if not torch.is_tensor(each)]
        if others:
            raise PlanError(
                "ExecuTorch takes tensors alone, and the sample inputs have"
                f" {type(others[0]).__name__}: give a module that takes tensors"
            )

    def notes(self, contents: Contents) -> tuple[str, ...]:
        if not _reads_tokens(contents.loaded):
            return ("the program takes inputs of the shapes of the sample inputs, as float32",)
        return (
            f"the program takes 1 to {_longest(contents.loaded)} tokens and returns the logits of"
            " all, without a cache: to generate, use ExecuTorch's own export_llm",
        )

    def write(self, contents: Contents, folder: Path) -> None:
        loaded = contents.loaded
        layers = {
            name: (contents.layers[name], tensor)
            for name, tensor in contents.tensors
            if isinstance(tensor, NeutralWeight)
        }
        weights = {name: _tensor(layer, neutral) for name, (layer, neutral) in layers.items()}
        module = _Whole(_in_float32(loaded.module, weights), tokens=_reads_tokens(loaded))
        try:
            with quiet():
                program = _lowered(module, _given(loaded), loaded)
        except Exception as error:  # what torch.export and ExecuTorch raise has no common base
            raise CheckpointError(
                "ExecuTorch cannot make a program of this model:"
                f" {first_line(error, with_type=True)}"
            ) from error
        for name, (layer, neutral) in layers.items():
            _check_inside(program, layer, neutral, name)
        (folder / _FILE).write_bytes(program)
        if loaded.tokenizer is not None and hasattr(loaded.tokenizer, "save_pretrained"):
            loaded.tokenizer.save_pretrained(folder)

    def read(self, folder: Path, contents: Contents, trust: Trust) -> nn.Module:
        return Program(folder / _FILE)


def _reads_tokens(loaded: LoadedModel) -> bool:
    return loaded.kind in ("causal_lm", "token_lm")


def _longest(loaded: LoadedModel) -> int:
    return min(_MOST_TOKENS, loaded.max_positions or _MOST_TOKENS)


def _leaves(inputs: Inputs) -> list[Any]:
    return pytree.tree_leaves(inputs)


def _given(loaded: LoadedModel) -> Inputs:
    """Return the inputs that the program is traced with, on the CPU, and floats in float32."""
    args, kwargs = pytree.tree_map(_as_input, read_inputs(loaded))
    if _reads_tokens(loaded):
        return (args[0][:, : _longest(loaded)],), {}
    return args, kwargs


def _as_input(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


class _Whole(nn.Module):
    """A model that returns one tensor."""

    def __init__(self, model: nn.Module, *, tokens: bool) -> None:
        super().__init__()
        self.model = model
        self._without_cache = tokens and is_causal_lm(model)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._without_cache:
            return output_tensor(run_on_tokens(self.model, *args))
        return output_tensor(self.model(*args, **kwargs))


class Program(nn.Module):
    """A program on disk, run by ExecuTorch's runtime."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        with quiet():  # it warns that it may change
            from executorch.runtime import Runtime

            self._program = Runtime.get().load_program(path)
            self._method = self._program.load_method("forward")

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("use_cache", None)
        given = [_as_input(each) for each in _leaves((args, kwargs))]
        return cast(torch.Tensor, self._method.execute(given)[0])


def _tensor(layer: ExportedLayer, weight: NeutralWeight) -> torch.Tensor:
    """Return a layer as torchao's tensor, whose activations are rounded for each token.

    Raises:
        PlanError: XNNPACK would round the scales.
    """
    assert weight.scale is not None  # it is quantized
    scale = weight.scale.float()
    bits = _BITS[layer.scheme.name]
    if bits == 4 and not torch.equal(scale, scale.bfloat16().float()):
        raise PlanError(
            f"{layer.name}: XNNPACK holds scales of groups in bfloat16, and those of a"
            f" {layer.choice.shape.dtype} model are finer: search it with --dtype bf16"
        )
    made = IntxUnpackedToInt8Tensor(
        weight.codes.contiguous(),
        scale.contiguous(),
        torch.zeros_like(scale, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=(1, weight.group),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
    return cast(torch.Tensor, made)


def _in_float32(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy on the CPU in float32, with other tensors for quantized weights."""
    copied = shallow_copy(model)
    known: dict[int, nn.Parameter] = {}
    for path, part in list(copied.named_modules()):
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            tensor = weights.get(f"{path}.{name}" if path else name)
            if tensor is not None:
                part._parameters[name] = nn.Parameter(tensor, requires_grad=False)
                continue
            if id(parameter) not in known:
                known[id(parameter)] = nn.Parameter(_plain(parameter.data), requires_grad=False)
            part._parameters[name] = known[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _as_input(buffer)
        if path and isinstance(part, ApartLinear):
            copied.set_submodule(path, _linear(part))
    return copied.eval()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    numbers = tensor.dequantize() if isinstance(tensor, RoutedWeight) else tensor
    return _as_input(numbers)


def _linear(part: nn.Linear) -> nn.Linear:
    """Return a linear with the forward pass of PyTorch and the same parameters."""
    made = nn.Linear(1, 1, bias=part.bias is not None, device="meta")
    made.in_features, made.out_features = part.in_features, part.out_features
    made._parameters.update(part._parameters)
    return made


def _lowered(module: nn.Module, inputs: Inputs, loaded: LoadedModel) -> bytes:
    """Return the bytes of the program."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    args, kwargs = inputs
    shapes = None
    if _reads_tokens(loaded):
        tokens = torch.export.Dim("tokens", min=1, max=_longest(loaded))
        shapes = {"args": ({1: tokens},)}
    exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def _check_inside(program: bytes, layer: ExportedLayer, weight: NeutralWeight, name: str) -> None:
    """Check that a program holds the integers and the scales of a layer.

    Raises:
        CheckpointError: It does not.
    """
    assert weight.scale is not None  # it is quantized
    codes, scale = weight.codes.contiguous(), weight.scale.contiguous()
    if _BITS[layer.scheme.name] == 4:
        unsigned = (codes.to(torch.int16) + 8).to(torch.uint8)
        codes = unsigned[:, 1::2] << 4 | unsigned[:, ::2]
    scales = [scale.bfloat16().view(torch.int16), scale.float()]
    if codes.numpy().tobytes() not in program or not any(
        each.numpy().tobytes() in program for each in scales
    ):
        raise CheckpointError(
            f"{layer.name} as {layer.scheme.name} has other numbers in the program than"
            f" {layer.values}: XNNPACK did not take {name}; please report this"
        )


WRITER = ExecutorchWriter()
