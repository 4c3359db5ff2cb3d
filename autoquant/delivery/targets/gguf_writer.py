"""Write one GGUF, which llama.cpp and what is built on it read.

It begins as a GGUF of the unquantized model: the user's own, or one that `gguf_convert.py` makes of
the model's folder. That has the tokenizer, the settings, and every tensor that the plan leaves
alone. Quantized layers are replaced by blocks of the plan's own integers (`gguf_blocks.py`). Beside
it lies `tensor-types.txt`, the same types for llama.cpp's quantizer, which rounds to other numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from autoquant.candidates.neutral import NeutralWeight
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.targets.base import EMBEDDINGS, Contents, ExportedLayer, Writer
from autoquant.delivery.targets.gguf_blocks import blocks
from autoquant.delivery.targets.gguf_convert import Conversion
from autoquant.delivery.targets.gguf_file import GgufFile
from autoquant.engines import Values
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
        base: The unquantized model's, or None if it is made of the model's folder.
        embedding: One of `EMBEDDINGS`.
        conversion: How the model's folder becomes the base, once the model is known.
    """

    target = GGUF
    reader = ("gguf",)

    def __init__(
        self,
        base: Path | None = None,
        embedding: str = "plan",
        conversion: Conversion | None = None,
    ) -> None:
        self.base = base
        self.embedding = embedding
        self.conversion = conversion

    def based_on(self, base: Path) -> Writer:
        return GgufWriter(base, self.embedding)

    def for_model(self, loaded: LoadedModel) -> Writer:
        if self.base is not None:
            return self
        return GgufWriter(None, self.embedding, Conversion.of(loaded))

    def with_embedding(self, kind: str) -> Writer:
        if kind not in EMBEDDINGS:
            raise PlanError(f"--embedding is one of {', '.join(EMBEDDINGS)}, not {kind!r}")
        return GgufWriter(self.base, kind)

    def rounds(self, loaded: LoadedModel) -> tuple[str, ...]:
        if self.embedding == "plan":
            return ()
        model: Any = loaded.module
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        parts = [embedding, *([head] if tied and not _is_quantized(head.weight) else [])]
        named = model.named_modules()
        return tuple(
            f"{name}.weight" for name, part in named if any(part is each for each in parts)
        )

    def check_given(self) -> None:
        if self.missing():
            raise PlanError("writing a GGUF needs the package gguf: pip install gguf")
        if self.base is not None:
            GgufFile(self.base)

    def check(self, loaded: LoadedModel) -> None:
        """Refuse no model: which ones a GGUF holds is for the converter of a base to say."""

    def write(self, contents: Contents, folder: Path) -> None:
        with TemporaryDirectory(dir=folder.parent) as scratch:
            made = self.base
            if made is None:
                conversion = self.conversion or Conversion.of(contents.loaded)
                made = Path(scratch) / _FILE
                conversion.write(contents.dtype, made)
            self._write(GgufFile(made), contents, folder)

    def _write(self, base: GgufFile, contents: Contents, folder: Path) -> None:
        names = _names(base, contents.layers)
        _check_embedding(self.embedding, base, names.values())
        made = _Copy(base, folder / _FILE, self.embedding)
        for name, tensor in contents.tensors:
            if isinstance(tensor, NeutralWeight):
                made.add(names[name], tensor, contents.layers[name])
            elif tensor.ndim == 2:
                _check_same(base, name, tensor)
        made.finish()
        if not contents.layers:
            return
        types = {name: kind for name, kind in made.types.items() if name in base.tensors}
        lines = [f"^{re.escape(name)}$={kind.lower()}" for name, kind in types.items()]
        (folder / _RECIPE).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def read(self, folder: Path, contents: Contents, trust: Trust) -> nn.Module:
        """Return the model with the numbers that the package gguf reads."""
        file = GgufFile(folder / _FILE)
        module = shallow_copy(contents.loaded.module)
        rounded = self.rounds(contents.loaded)
        for path, part in module.named_modules():
            for leaf, parameter in part._parameters.items():
                name = f"{path}.{leaf}"
                if parameter is not None and name in rounded:
                    numbers = file.numbers(_EMBEDDING)
                elif parameter is not None and isinstance(parameter.data, RoutedWeight):
                    numbers = _read(file, name, parameter.data.dequantize())
                else:
                    continue
                moved = numbers.to(parameter.device, parameter.dtype)
                part._parameters[leaf] = nn.Parameter(moved, requires_grad=False)
        return module

    def notes(self, contents: Contents) -> tuple[str, ...]:
        two = contents.unties and self.embedding != "head"
        untied = " It cannot quantize the head, which is tied to the embedding in the base."
        recipe = (
            f"{_RECIPE} names the same types for llama.cpp's quantizer (llama-quantize"
            " --tensor-type-file), which rounds by itself: what it writes has other numbers than"
            f" the plan.{untied if two else ''}"
        )
        smaller = (
            "the embedding is kept beside the head, which is quantized: --embedding head writes one"
            " tensor for both, --embedding int8 rounds it to Q8_0"
            if contents.unties
            else "the embedding is not quantized: --embedding int8 rounds it to Q8_0, with a head"
            " that is tied to it, for a smaller file"
        )
        return (
            *(self.conversion.notes if self.conversion else ()),
            *([recipe] if contents.layers else ()),
            *([smaller] if contents.layers and self.embedding == "plan" else ()),
        )


def _check_embedding(kind: str, base: GgufFile, names: Collection[str]) -> None:
    """Refuse an embedding that cannot become what the user asked for.

    Args:
        names: Of the quantized layers in a GGUF.
    """
    tied = _HEAD not in base.tensors
    if kind == "head" and not (tied and _HEAD in names):
        raise PlanError(
            "--embedding head is for a head that is tied to the embedding, and that the plan"
            " quantizes; it is not: --embedding int8 rounds the embedding, and a head tied to it"
        )


def _is_quantized(weight: torch.Tensor) -> bool:
    data = weight.data
    return isinstance(data, RoutedWeight) and not Values.parse(data.format_id).is_plain


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

    A head that is tied to an unquantized embedding is not there: its own numbers are returned.
    """
    place = file.name_of(name)
    if place == _HEAD and place not in file.tensors and not file.is_plain(_EMBEDDING):
        place = _EMBEDDING
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

    def __init__(self, base: GgufFile, path: Path, embedding: str = "plan") -> None:
        import gguf

        self._base = base
        self._embedding = embedding
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
        stands_for_both = name == _HEAD and self._embedding == "head"
        place = _EMBEDDING if stands_for_both else name
        self._add(place, made[order].contiguous().numpy(), kind)
        if weight.tensor_scale is not None:
            scale = weight.tensor_scale.float().reshape(1).numpy()
            self._writer.add_tensor(place.removesuffix(".weight") + ".scale", scale)

    def finish(self) -> None:
        """Add all else from the base, and write the file."""
        if self._embedding == "int8":
            self._round_embedding()
        for tensor in self._base.reader.tensors:
            if tensor.name not in self._added:
                self._add(tensor.name, tensor.data, tensor.tensor_type)
        self._add_settings()
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()

    def _round_embedding(self) -> None:
        import gguf

        kind = gguf.GGMLQuantizationType.Q8_0
        numbers = self._base.numbers(_EMBEDDING).numpy()
        self._add(_EMBEDDING, gguf.quants.quantize(numbers, kind), kind)

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
