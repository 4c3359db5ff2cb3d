"""Write a folder of torchao's tensors, which `from_pretrained` of transformers reads by itself.

A layer is one of torchao's tensors in `model.safetensors`, flattened by torchao's own scheme: each
file's metadata says what the tensors of the whole model are. The `config.json` has the
configuration of torchao that makes each layer. transformers makes the tensors by the metadata.
vLLM makes them by the configuration and copies the numbers, so both agree in every attribute. It
also asks for the layers that it computes as one, by a name of its own.

Source: transformers 5.23, `quantizers/quantizer_torchao.py`; torchao 0.18,
`prototype/safetensors/`; vLLM 0.32, `quantization/torchao.py`.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
    PerTensor,
)
from torchao.quantization.quantize_.workflows.float8.float8_tensor import (
    QuantizeTensorToFloat8Kwargs,
)
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

from autoquant.candidates.neutral import NeutralWeight
from autoquant.delivery.shards import PlainWriter
from autoquant.delivery.targets.base import Contents, ExportedLayer, Writer
from autoquant.delivery.targets.huggingface import check_folder_model, read_folder, write_beside
from autoquant.engines import engine
from autoquant.engines.targets import TRANSFORMERS
from autoquant.engines.values import A16
from autoquant.errors import CheckpointError
from autoquant.models import LoadedModel
from autoquant.models.trust import Trust

_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""vLLM's names of layers that it computes as one, by the first of them."""


class TorchaoWriter(Writer):
    """Writes folders of torchao's tensors."""

    target = TRANSFORMERS
    reader = ("transformers", "torchao")

    def check(self, loaded: LoadedModel) -> None:
        check_folder_model(loaded, self.target.name)

    def write(self, contents: Contents, folder: Path) -> None:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        files = PlainWriter(folder)
        described: dict[str, str] = {}
        for name, tensor in contents.tensors:
            if isinstance(tensor, NeutralWeight):
                tensor = _checked(contents.layers[name], tensor, contents.dtype)
            flat, metadata = flatten_tensor_state_dict({name: tensor})
            del metadata["tensor_names"]
            described |= metadata
            for part_name, part in flat.items():
                files.add(part_name, part)
        files.finish({**described, "tensor_names": json.dumps(list(described))})
        write_beside(contents, quantization_config(contents.layers), folder)

    def read(self, folder: Path, contents: Contents, trust: Trust) -> nn.Module:
        return read_folder(folder, contents.loaded, trust)


def _checked(layer: ExportedLayer, weight: NeutralWeight, dtype: str) -> torch.Tensor:
    """Return torchao's tensor of a layer, and compare its numbers.

    Raises:
        CheckpointError: They are others.
    """
    made = torchao_tensor(layer, weight, getattr(torch, dtype))
    numbers: torch.Tensor = cast(Any, made).dequantize()
    if not torch.equal(numbers, weight.dequantize().to(numbers.dtype)):
        raise CheckpointError(
            f"{layer.name} as {layer.scheme.name} has other numbers than {layer.values}; please"
            " report this"
        )
    return made


def torchao_tensor(layer: ExportedLayer, weight: NeutralWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return a layer as torchao's tensor, with the attributes that its configuration gives.

    Args:
        dtype: The dtype that the tensor shows.
    """
    assert weight.scale is not None  # it is quantized
    n, k = weight.codes.shape
    scale, rounds = weight.scale, layer.scheme.activation != A16
    made: Any
    if layer.scheme.name == "Int8Tensor":
        kwargs = QuantizeTensorToInt8Kwargs(PerRow()) if rounds else None
        zero = torch.zeros(n, 1, dtype=torch.int8)
        made = Int8Tensor(
            weight.codes, scale.float(), [1, k], dtype, zero_point=zero, act_quant_kwargs=kwargs
        )
    elif layer.scheme.name == "Float8Tensor":
        whole = layer.values.family == "float8-tensor"
        made = Float8Tensor(
            weight.codes,
            scale[:1].float() if whole else scale.float(),
            block_size=[n, k] if whole else [1, k],
            mm_config=Float8MMConfig(use_fast_accum=True) if rounds else None,
            act_quant_kwargs=(
                QuantizeTensorToFloat8Kwargs(granularity=PerTensor() if whole else PerRow())
                if rounds
                else None
            ),
            dtype=dtype,
        )
    else:
        made = IntxUnpackedToInt8Tensor(
            weight.codes,
            scale.contiguous(),
            torch.zeros_like(scale, dtype=torch.int8),
            target_dtype=getattr(torch, f"int{weight.bits}"),
            block_size=(1, weight.group),
            dtype=dtype,
            activation_quantization=None,
        )
    return cast(torch.Tensor, made)


def torchao_config(layer: ExportedLayer) -> Any:
    """Return the configuration of torchao that makes a layer's tensor."""
    rounds = layer.scheme.activation != A16
    if layer.scheme.name == "Int8Tensor":
        kind = Int8DynamicActivationInt8WeightConfig if rounds else Int8WeightOnlyConfig
        return kind(granularity=PerRow(), version=2)
    if layer.scheme.name == "Float8Tensor":
        granularity = PerTensor() if layer.values.family == "float8-tensor" else PerRow()
        kind = Float8DynamicActivationFloat8WeightConfig if rounds else Float8WeightOnlyConfig
        return kind(granularity=granularity)
    bits = layer.values.family.removeprefix("int").removesuffix("s")
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(layer.values.group)
    )


def quantization_config(layers: Mapping[str, ExportedLayer]) -> dict[str, Any]:
    """Return the `quantization_config` of a `config.json`."""
    from transformers import TorchAoConfig

    configs = OrderedDict((layer.name, torchao_config(layer)) for layer in layers.values())
    for group in engine("vllm").fused(list(configs)):
        holder, _, first = group[0].rpartition(".")
        if first in _FUSED and len({str(configs[name]) for name in group}) == 1:
            configs[f"{holder}.{_FUSED[first]}"] = configs[group[0]]
    return cast(dict[str, Any], TorchAoConfig(FqnToConfig(configs)).to_dict())


WRITER = TorchaoWriter()
