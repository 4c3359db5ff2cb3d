"""Write a folder as NVIDIA ModelOpt does, which vLLM reads.

`hf_quant_config.json`, and the same in `config.json`, name every quantized layer in full with its
algorithm. A layer has several tensors in `model.safetensors`:

- `FP8_PER_CHANNEL_PER_TOKEN`: `weight` `[n, k]` as float8 (e4m3), `weight_scale` float32 `[n]`;
- `MXFP8`: the same with the exponents `weight_scale` as uint8 `[n, k / 32]`;
- `W4A16_NVFP4`: `weight`, two e2m1 a byte with the even column low; `weight_scale` float8
  `[n, k / 16]`; `weight_scale_2` float32 `[]`, which multiplies all of them.

Source: vLLM 0.32, `model_executor/layers/quantization/modelopt.py`; nvidia-modelopt 0.47,
`torch/export/quant_utils.py` and `torch/quantization/qtensor/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from autoquant.candidates.neutral import NeutralWeight
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.shards import PlainWriter
from autoquant.delivery.targets.base import Contents, ExportedLayer, Writer
from autoquant.delivery.targets.huggingface import check_folder_model, write_beside
from autoquant.engines.targets import MODELOPT
from autoquant.errors import CheckpointError
from autoquant.models import LoadedModel, weights
from autoquant.models.copies import shallow_copy
from autoquant.models.quiet import quiet
from autoquant.models.trust import Trust

_CONFIG = "hf_quant_config.json"
_NVFP4, _MXFP8 = "W4A16_NVFP4", "MXFP8"


class ModeloptWriter(Writer):
    """Writes folders as NVIDIA ModelOpt does."""

    target = MODELOPT
    reader = ("nvidia-modelopt",)

    def check(self, loaded: LoadedModel) -> None:
        check_folder_model(loaded, self.target.name)

    def write(self, contents: Contents, folder: Path) -> None:
        files = PlainWriter(folder)
        for name, tensor in contents.tensors:
            if not isinstance(tensor, NeutralWeight):
                files.add(name, tensor)
                continue
            layer = contents.layers[name]
            parts = encode(tensor, layer.scheme.name)
            decoded = decode(parts, layer.scheme.name)
            if not torch.equal(decoded.dequantize(), tensor.dequantize()):
                raise CheckpointError(
                    f"{layer.name} as {layer.scheme.name} has other numbers than {layer.values};"
                    " please report this"
                )
            for suffix, part in parts.items():
                files.add(f"{name}{suffix}", part)
        files.finish()
        settings = quantization(contents)
        write_beside(contents, _in_config(settings), folder)
        about = {"producer": {"name": "autoquant"}, "quantization": settings}
        (folder / _CONFIG).write_text(json.dumps(about, indent=2), encoding="utf-8")

    def read(self, folder: Path, contents: Contents, trust: Trust) -> nn.Module:
        """Return the model with the numbers that ModelOpt's own tensors give.

        ModelOpt loads no such folder itself.
        """
        stored = _tensors(folder)
        module = shallow_copy(contents.loaded.module)
        for path, part in module.named_modules():
            for leaf, parameter in part._parameters.items():
                if parameter is None or not isinstance(parameter.data, RoutedWeight):
                    continue
                name = f"{path}.{leaf}"
                if name in contents.layers:
                    numbers = _dequantized(stored, name, contents.layers[name])
                else:
                    numbers = stored[name]
                moved = numbers.to(parameter.device, parameter.dtype)
                part._parameters[leaf] = nn.Parameter(moved, requires_grad=False)
        return module


def encode(weight: NeutralWeight, algorithm: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer, by what is appended to the name of its weight."""
    assert weight.scale is not None  # it is quantized
    if algorithm == _NVFP4:
        assert weight.tensor_scale is not None  # every nvfp4 weight has one
        return {
            "": weight.codes[:, 1::2] << 4 | weight.codes[:, ::2],
            "_scale": weight.scale.contiguous(),
            "_scale_2": weight.tensor_scale.float().reshape(()),
        }
    if algorithm == _MXFP8:
        return {"": weight.codes, "_scale": weight.scale.contiguous()}
    return {"": weight.codes, "_scale": weight.scale.float().reshape(-1)}


def decode(parts: Mapping[str, torch.Tensor], algorithm: str) -> NeutralWeight:
    """Return the weight that `encode` gave as `parts`."""
    codes, scale = parts[""], parts["_scale"]
    if algorithm == _NVFP4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        shared = parts["_scale_2"]
        return NeutralWeight(codes=codes, bits=4, scale=scale, group=16, tensor_scale=shared)
    if algorithm == _MXFP8:
        return NeutralWeight(codes=codes, bits=8, scale=scale, group=32)
    return NeutralWeight(codes=codes, bits=8, scale=scale.unsqueeze(1), group=codes.shape[1])


def quantization(contents: Contents) -> dict[str, Any]:
    """Return the `quantization` of a `hf_quant_config.json`."""
    layers = {}
    for layer in contents.layers.values():
        layers[layer.name] = {"quant_algo": layer.scheme.name}
        if layer.scheme.name == _NVFP4:
            layers[layer.name] |= {"group_size": 16}  # type: ignore[dict-item]
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "exclude_modules": _excluded(contents.linears, layers),
        "quantized_layers": layers,
    }


def _excluded(linears: tuple[str, ...], quantized: Mapping[str, Any]) -> list[str]:
    """Return the unquantized linears that can be named.

    vLLM also skips layers that have such a name within theirs. It leaves those alone that are not
    named at all.
    """
    return [name for name in linears if not any(name in other for other in quantized)]


def _in_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same as `config.json` has it."""
    return {
        "quant_method": "modelopt",
        "quant_algo": settings["quant_algo"],
        "ignore": settings["exclude_modules"],
        "quantized_layers": settings["quantized_layers"],
        "producer": {"name": "autoquant"},
    }


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: tensor for file in weights.files(folder) for name, tensor in load_file(file).items()
    }


def _dequantized(
    stored: Mapping[str, torch.Tensor], name: str, layer: ExportedLayer
) -> torch.Tensor:
    """Return what ModelOpt's tensor of a layer holds, in float32."""
    with quiet():
        from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

    kinds: Mapping[str, Any] = {_NVFP4: NVFP4QTensor, _MXFP8: MXFP8QTensor}
    shape = torch.Size((layer.choice.shape.n, layer.choice.shape.k))
    kind: Any = kinds.get(layer.scheme.name, FP8QTensor)
    made = kind(shape, torch.float32, stored[name])
    scale = stored[f"{name}_scale"]
    options: dict[str, Any] = {"scale": scale}
    if layer.scheme.name == _NVFP4:
        options |= {"double_scale": stored[f"{name}_scale_2"], "block_sizes": {-1: 16}}
    elif layer.scheme.name != _MXFP8:
        options["scale"] = scale.unsqueeze(1)
    return cast(torch.Tensor, made.dequantize(dtype=torch.float32, **options))


WRITER = ModeloptWriter()
