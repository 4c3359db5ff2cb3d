"""Write one GGUF, which llama.cpp and what is built on it read.

The user's own 16-bit GGUF of the model is taken: its tokenizer, its settings, and every tensor that
the plan leaves alone. Quantized layers are replaced by blocks of the plan's own integers
(`gguf_blocks.py`). Beside it lies `tensor-types.txt`, the same types for llama.cpp's quantizer,
which rounds to other numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.candidates.neutral import NeutralWeight
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.targets.base import Contents, ExportedLayer, Writer
from autoquant.delivery.targets.gguf_blocks import blocks
from autoquant.delivery.targets.gguf_file import GgufFile
from autoquant.engines.targets import GGUF
from autoquant.errors import CheckpointError, PlanError
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy
from autoquant.models.quiet import some
from autoquant.models.trust import Trust

_FILE, _RECIPE = "model.gguf", "tensor-types.txt"
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_OTHER_MODEL = 0.9
"""Quantized numbers are nearer than this to the weight that they stand for, relative to it."""
_HALF_STEP = 2**-10
"""What rounding scales to float16 may move a weight by, relative to its row's largest."""


class GgufWriter(Writer):
    """Writes a GGUF that begins as another one.

    Attributes:
        base: The unquantized model's, or None if the user gave none.
    """

    target = GGUF
    reader = ("gguf",)

    def __init__(self, base: Path | None = None) -> None:
        self.base = base

    def based_on(self, base: Path) -> Writer:
        return GgufWriter(base)

    def check_given(self) -> None:
        if self.missing():
            raise PlanError("writing a GGUF needs the package gguf: pip install gguf")
        if self.base is None:
            raise PlanError(
                "gguf needs a GGUF of the unquantized model, for its tokenizer and settings: give"
                " it as --base (`convert_hf_to_gguf.py MODEL --outtype bf16` of llama.cpp writes"
                " one)"
            )
        GgufFile(self.base)

    def check(self, loaded: LoadedModel) -> None:
        """Refuse no model: which ones a GGUF holds is for the converter of its base to say."""

    def write(self, contents: Contents, folder: Path) -> None:
        assert self.base is not None  # `check` refused that
        base = GgufFile(self.base)
        names = _names(base, contents.layers)
        made = _Copy(base, folder / _FILE)
        for name, tensor in contents.tensors:
            if isinstance(tensor, NeutralWeight):
                made.add(names[name], tensor, contents.layers[name])
            elif tensor.ndim == 2:
                _check_same(base, name, tensor)
        made.finish()
        types = {name: kind for name, kind in made.types.items() if name in base.tensors}
        lines = [f"^{re.escape(name)}$={kind.lower()}" for name, kind in types.items()]
        (folder / _RECIPE).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def read(self, folder: Path, contents: Contents, trust: Trust) -> nn.Module:
        """Return the model with the numbers that the package gguf reads."""
        file = GgufFile(folder / _FILE)
        module = shallow_copy(contents.loaded.module)
        for path, part in module.named_modules():
            for leaf, parameter in part._parameters.items():
                if parameter is not None and isinstance(parameter.data, RoutedWeight):
                    numbers = _read(file, f"{path}.{leaf}", parameter.data.dequantize())
                    moved = numbers.to(parameter.device, parameter.dtype)
                    part._parameters[leaf] = nn.Parameter(moved, requires_grad=False)
        return module

    def notes(self, contents: Contents) -> tuple[str, ...]:
        untied = " It cannot quantize the head, which is tied to the embedding in the base."
        return (
            f"{_RECIPE} names the same types for llama.cpp's quantizer (llama-quantize"
            " --tensor-type-file), which rounds by itself: what it writes has other numbers than"
            f" the plan.{untied if contents.unties else ''}",
        )


def _names(base: GgufFile, layers: Mapping[str, ExportedLayer]) -> dict[str, str]:
    """Return the names in a GGUF of all layers.

    Raises:
        PlanError: Some are not in the base, or are quantized there.
    """
    found = {name: base.name_of(name) for name in layers}
    names = {name: there for name, there in found.items() if there is not None}
    places = {name: _replaced(base, there) for name, there in names.items()}
    if missing := [name for name in layers if places.get(name) not in base.tensors]:
        raise PlanError(
            f"{base.path} has no tensor for {some(missing)}: it is of another model, or its"
            " converter stacks or splits them, which is not supported"
        )
    if quantized := [name for name, place in places.items() if not base.is_plain(place)]:
        raise PlanError(f"{base.path} is quantized itself ({some(quantized)}): give a 16-bit one")
    return names


def _replaced(base: GgufFile, name: str) -> str:
    """Return the tensor of the base that has a layer's unquantized numbers."""
    return _EMBEDDING if name == _HEAD and name not in base.tensors else name


def _check_same(base: GgufFile, name: str, tensor: torch.Tensor) -> None:
    """Refuse a base in which a matrix that the plan leaves alone has other numbers."""
    place = base.name_of(name)
    if place is None or place not in base.tensors:
        return
    numbers = base.numbers(place)
    if numbers.shape != tensor.shape or base.order_of(tensor.float(), numbers)[1] > 0:
        raise PlanError(
            f"{base.path} has other numbers for {name} than the model: convert the model that was"
            " searched, in its own dtype (--outtype bf16)"
        )


def _read(file: GgufFile, name: str, numbers: torch.Tensor) -> torch.Tensor:
    """Return the numbers that a file has for a layer, in the order of its rows in the model.

    A head that is tied to the embedding is not there: its own numbers are returned.
    """
    place = file.name_of(name)
    if place is None or place not in file.tensors:
        return numbers.contiguous()
    stored = file.numbers(place)
    order, _ = file.order_of(numbers.cpu(), stored)
    back = torch.empty_like(stored)
    back[order] = stored
    return back


class _Copy:
    """A GGUF that is being written: the base, but for tensors that are added.

    Attributes:
        types: The type of every matrix, by name.
    """

    def __init__(self, base: GgufFile, path: Path) -> None:
        import gguf

        self._base = base
        # Tensors wait in a temporary file, so that a large model need not fit into memory.
        self._writer: Any = gguf.GGUFWriter(path, base.architecture, use_temp_file=True)
        self._bytes: Counter[str] = Counter()
        self._added: set[str] = set()
        self.types: dict[str, str] = {}

    def add(self, name: str, weight: NeutralWeight, layer: ExportedLayer) -> None:
        """Add a quantized layer.

        Raises:
            PlanError: The base has another weight there.
            CheckpointError: float16 does not hold the scales.
        """
        import gguf

        numbers = weight.dequantize()
        original = self._base.numbers(_replaced(self._base, name))
        if original.shape != numbers.shape:
            raise _other_model(self._base, layer)
        order, error = self._base.order_of(numbers, original)
        if error > _OTHER_MODEL:
            raise _other_model(self._base, layer)
        kind = gguf.GGMLQuantizationType[layer.scheme.name]
        made = blocks(weight, layer.scheme.name)
        decoded = torch.from_numpy(gguf.quants.dequantize(made.numpy(), kind))
        if weight.tensor_scale is not None:
            decoded = decoded * weight.tensor_scale
        largest = numbers.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
        if float(((decoded - numbers).abs() / largest).max()) > _HALF_STEP:
            raise CheckpointError(
                f"{layer.name} as {layer.scheme.name} has other numbers than {layer.values}:"
                " its scales are too small or too large for float16"
            )
        self._add(name, made[order].contiguous().numpy(), kind)
        if weight.tensor_scale is not None:
            scale = weight.tensor_scale.float().reshape(1).numpy()
            self._writer.add_tensor(name.removesuffix(".weight") + ".scale", scale)

    def finish(self) -> None:
        """Add all else from the base, and write the file."""
        for tensor in self._base.reader.tensors:
            if tensor.name not in self._added:
                self._add(tensor.name, tensor.data, tensor.tensor_type)
        self._add_settings()
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()

    def _add(self, name: str, data: Any, kind: Any) -> None:
        self._writer.add_tensor(name, data, raw_dtype=kind)
        self._added.add(name)
        if data.ndim > 1:
            self.types[name] = kind.name
            self._bytes[kind.name] += data.nbytes

    def _add_settings(self) -> None:
        """Copy the base's settings. The type of the file is that of most of its bytes."""
        import gguf

        skipped = ("general.architecture", "general.file_type", "general.quantization_version")
        for field in self._base.reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in skipped:
                continue
            kind = field.types[0]
            of_array = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            self._writer.add_key_value(field.name, field.contents(), kind, sub_type=of_array)
        most = self._bytes.most_common(1)[0][0]
        named = getattr(gguf.LlamaFileType, f"MOSTLY_{most}", None)
        if named is not None:
            self._writer.add_file_type(named)
        self._writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _other_model(base: GgufFile, layer: ExportedLayer) -> PlanError:
    return PlanError(
        f"{base.path} has another weight for {layer.name}: give a GGUF of the model that was"
        " searched"
    )


WRITER = GgufWriter()
