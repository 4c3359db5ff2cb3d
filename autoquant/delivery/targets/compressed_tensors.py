"""Write a folder in the form of compressed-tensors, which vLLM, SGLang and transformers read.

The `config.json` names every quantized layer in full, grouped by scheme. A layer has several
tensors in `model.safetensors`, by scheme:

- `int-quantized`, `float-quantized`: `weight` `[n, k]` as int8 or float8 (e4m3), `weight_scale`
  `[n, 1]`;
- `pack-quantized`: `weight_packed`, int32 `[n, k * bits / 32]` of one stream of bits a row, lowest
  first, of integers from 0; `weight_scale` `[n, k / group]`; `weight_shape`;
- `mxfp8-quantized`, `mxfp4-pack-quantized`: e4m3, or two e2m1 a byte with the even column low, and
  the exponents `weight_scale` as uint8 `[n, k / 32]`;
- `nvfp4-pack-quantized`: the same with float8 scales `[n, k / 16]` and `weight_global_scale`, the
  reciprocal of the tensor's scale.

Source: the package compressed-tensors 0.20.1, `compressors/` and `quantization/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates.neutral import NeutralWeight
from autoquant.delivery.shards import PlainWriter
from autoquant.delivery.targets.base import Contents, ExportedLayer, Writer
from autoquant.delivery.targets.huggingface import check_folder_model, read_folder, write_beside
from autoquant.engines import Scheme
from autoquant.engines.targets import COMPRESSED_TENSORS
from autoquant.errors import CheckpointError
from autoquant.models import LoadedModel
from autoquant.models.trust import Trust

_MIXED = "mixed-precision"
_BY_ROW = ("int8-row", "float8-row", "float8-tensor")
_PACKED_FLOATS = ("mxfp4-pack-quantized", "nvfp4-pack-quantized")
_ACTIVATIONS: Mapping[str, Mapping[str, Any]] = {
    "a8-row": {"num_bits": 8, "type": "int", "strategy": "token"},
    "a8-float8-row": {"num_bits": 8, "type": "float", "strategy": "token"},
    "a-mxfp8": {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
    "a-mxfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
}


class CompressedTensorsWriter(Writer):
    """Writes folders in the form of compressed-tensors."""

    target = COMPRESSED_TENSORS
    reader = ("transformers", "compressed-tensors")

    def check(self, loaded: LoadedModel) -> None:
        check_folder_model(loaded, self.target.name)

    def write(self, contents: Contents, folder: Path) -> None:
        files = PlainWriter(folder)
        groups: dict[str, Group] = {}
        for name, tensor in contents.tensors:
            if not isinstance(tensor, NeutralWeight):
                files.add(name, tensor)
                continue
            layer = contents.layers[name]
            parts = encode(tensor, layer.scheme)
            decoded = decode(parts, tensor.bits, tensor.group).dequantize()
            if not _same(decoded, tensor):
                raise CheckpointError(
                    f"{layer.name} as {layer.scheme.name} has other numbers than {layer.values};"
                    " please report this"
                )
            for suffix, part in parts.items():
                files.add(f"{name}{suffix}", part)
            group = Group.of(layer, tensor)
            groups.setdefault(json.dumps(group.as_object()), group).targets.append(layer.name)
        files.finish()
        settings = quantization_config(list(groups.values()), contents.linears)
        write_beside(contents, settings, folder)

    def read(self, folder: Path, contents: Contents, trust: Trust) -> nn.Module:
        return read_folder(folder, contents.loaded, trust)


def _same(decoded: torch.Tensor, weight: NeutralWeight) -> bool:
    """Check that a layer holds the numbers of a weight.

    The reciprocal of a tensor's scale is another number by a step of float32.
    """
    numbers = weight.dequantize()
    if weight.tensor_scale is None:
        return torch.equal(decoded, numbers)
    return torch.allclose(decoded, numbers, rtol=1e-6, atol=0)


def encode(weight: NeutralWeight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer, by what is appended to the name of its weight."""
    assert weight.scale is not None
    scale = weight.scale.contiguous()
    if scheme.name == "pack-quantized":
        unsigned = (weight.codes.to(torch.int16) - weight.low).to(torch.uint8)
        shape = torch.tensor(weight.codes.shape)
        return {"_packed": pack_bits(unsigned, weight.bits), "_scale": scale, "_shape": shape}
    if scheme.name not in _PACKED_FLOATS:
        return {"": weight.codes, "_scale": scale}
    parts = {"_packed": weight.codes[:, 1::2] << 4 | weight.codes[:, ::2], "_scale": scale}
    if weight.tensor_scale is not None:
        parts["_global_scale"] = weight.tensor_scale.float().reciprocal().reshape(1)
    return parts


def decode(parts: Mapping[str, torch.Tensor], bits: int, group: int) -> NeutralWeight:
    """Return the weight that `encode` gave as `parts`.

    Args:
        bits: Of a code.
        group: Weights along k that share a scale.
    """
    scale, low = parts["_scale"], 0
    if "_shape" in parts:
        low = -(1 << (bits - 1))
        unsigned = unpack_bits(parts["_packed"], bits, int(parts["_shape"][1]))
        codes = (unsigned.to(torch.int16) + low).to(torch.int8)
    elif "_packed" in parts:
        packed = parts["_packed"]
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    else:
        codes = parts[""]
    shared = parts.get("_global_scale")
    return NeutralWeight(
        codes=codes,
        bits=bits,
        scale=scale,
        group=group,
        low=low,
        tensor_scale=None if shared is None else shared.reciprocal().reshape(()),
    )


def pack_bits(unsigned: torch.Tensor, bits: int) -> torch.Tensor:
    """Return integers `[n, k]` from 0 as int32 `[n, k * bits / 32]`, rounded up.

    A row is one stream of bits, the lowest first. Eight integers take `bits` bytes of it.

    Args:
        unsigned: uint8.
        bits: 1 to 8.
    """
    n, k = unsigned.shape
    eights = F.pad(unsigned, (0, -k % 8)).reshape(n, -1, 8)
    words = torch.zeros(eights.shape[:2], dtype=torch.int64)
    for place, codes in enumerate(eights.unbind(-1)):
        words |= codes.to(torch.int64) << (bits * place)
    octets = words.view(torch.uint8).reshape(n, -1, 8)[..., :bits].flatten(1)
    octets = F.pad(octets, (0, -octets.shape[1] % 4))
    return octets.view(torch.int32)[:, : -(-k * bits // 32)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Return the uint8 `[n, k]` that `pack_bits` packed."""
    n, eights = len(packed), -(-k // 8)
    octets = packed.view(torch.uint8)[:, : eights * bits]
    octets = F.pad(octets, (0, eights * bits - octets.shape[1])).reshape(n, eights, bits)
    words = F.pad(octets, (0, 8 - bits)).flatten(1).view(torch.int64)
    mask = (1 << bits) - 1
    codes = [((words >> (bits * place)) & mask).to(torch.uint8) for place in range(8)]
    return torch.stack(codes, dim=-1).flatten(1)[:, :k]


@dataclass(frozen=True, slots=True)
class Group:
    """Layers with one scheme.

    Attributes:
        weights: The arguments of the weight's quantization.
        activation: How the activation is rounded, e.g. `a8-row`.
    """

    format: str
    weights: Mapping[str, Any]
    activation: str
    targets: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, layer: ExportedLayer, weight: NeutralWeight) -> Group:
        """Return the group of a layer, without the layer."""
        integer = weight.codes.dtype == torch.int8
        assert weight.scale is not None  # it is quantized
        arguments: dict[str, Any] = {"num_bits": weight.bits, "type": "int" if integer else "float"}
        arguments["strategy"] = "channel"
        if layer.values.family not in _BY_ROW:
            in_blocks = weight.tensor_scale is not None
            arguments["strategy"] = "tensor_group" if in_blocks else "group"
            arguments["group_size"] = weight.group
        if weight.scale.itemsize == 1:
            arguments["scale_dtype"] = str(weight.scale.dtype)
        return cls(layer.scheme.name, arguments, layer.scheme.activation)

    def as_object(self) -> dict[str, Any]:
        """Return the group as `config_groups` has it."""
        rounded = _ACTIVATIONS.get(self.activation)
        return {
            "format": self.format,
            "targets": self.targets,
            "weights": {**self.weights, "symmetric": True, "dynamic": False},
            "input_activations": rounded and {**rounded, "symmetric": True, "dynamic": True},
            "output_activations": None,
        }


def quantization_config(groups: Sequence[Group], unquantized: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a `config.json`.

    Args:
        unquantized: Names of all linears that are in no group. Engines that compute several layers
            as one say clearly what is wrong only if each is named.
    """
    formats = {group.format for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{n}": group.as_object() for n, group in enumerate(groups)},
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


WRITER = CompressedTensorsWriter()
